"""The "quantization_config" of each format: where it stands, and how we write it; `layouts.py` reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marlin_gptq.config import Override, QuantizationConfig
from marlin_gptq.conversion.parallel import fused_names
from marlin_gptq.errors import CheckpointError
from marlin_gptq.model_directory import OLD_SETTINGS, read_json

ORIGINAL = "original"  # a state dict of the original Marlin repository, no directory
FORMATS = ("marlin", "gptq", "awq", "compressed-tensors")
HEAD = "lm_head"  # the name engines know the output head by


@dataclass(frozen=True)
class Layout:
    """How a directory stores its quantized linears.

    format      one of FORMATS, or ORIGINAL.
    group_size  128, 64, 32 or -1.
    sym         whether the settings claim a symmetric grid; None where they do not say.
    version     of the GPTQ layout: 1 stores zero points less one, 2 as they are.
    declared    whether the settings name that version; where they do not, `with_version` asks the files.
    desc_act    whether the settings claim act-order: groups may have moved.
    """

    format: str
    group_size: int
    sym: bool | None = None
    version: int = 1
    desc_act: bool = False
    declared: bool = True

    @property
    def title(self) -> str:
        """The format with its version, for people."""
        return f"gptq (version {self.version})" if self.format == "gptq" else self.format


def stored_settings(directory: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization settings of a model directory as a dictionary, or None for a full-precision one."""
    for key in ("quantization_config", "compression_config"):  # the second: old compressed-tensors
        settings = config.get(key)
        if settings is not None:
            if not isinstance(settings, dict):
                raise CheckpointError(
                    f"{directory}/config.json: {key}: got a JSON {type(settings).__name__}, expected an object"
                )
            return {"quant_method": "compressed-tensors"} | settings if key == "compression_config" else settings
    for name, method in OLD_SETTINGS.items():
        if (directory / name).exists():
            return {"quant_method": method} | read_json(directory / name)
    return None


@dataclass(frozen=True)
class Written:
    """What a result's settings have to say.

    layout   as the result is to be.
    kept     full names of the decoder linears that stay in 16 bits.
    beside   those of other matrices of the blocks, which engines may take for linears: routers of experts.
    outside  full names of the linears outside the decoder blocks that do: the head, as a rule.
    blocks   the name of the list of decoder blocks, `model.layers`.
    linears  full names of the quantized linears.
    sizes    group sizes of those that have another one than the layout, by full name: Marlin only.
    damp_percent, true_sequential  of the quantization, None where unknown.
    """

    layout: Layout
    kept: tuple[str, ...]
    outside: tuple[str, ...]
    blocks: str
    linears: tuple[str, ...]
    beside: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    damp_percent: float | None = None
    true_sequential: bool | None = None


def settings_for(result: Written) -> dict[str, Any]:
    """The "quantization_config" of a foreign format, with the fields that vLLM, SGLang and transformers read."""
    layout = result.layout
    outside = [name for name in result.outside if name != HEAD]  # a vision part
    left = [*outside, *result.kept, *result.beside]
    named = [*left, *fused_names(left, result.linears)]
    if layout.format == "gptq":
        settings: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": layout.group_size,
            "sym": bool(layout.sym),
            "desc_act": result.layout.desc_act,
            "static_groups": False,
            "lm_head": HEAD in result.linears,
            "checkpoint_format": "gptq" if layout.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"marlin-gptq:{version('marlin-gptq')}"]},
        }
        if result.damp_percent is not None and 0 < result.damp_percent < 1:  # what transformers accepts
            settings["damp_percent"] = result.damp_percent
        if result.true_sequential is not None:
            settings["true_sequential"] = result.true_sequential
        if outside or result.kept:
            settings["modules_in_block_to_quantize"] = _by_block(result)
        if named:
            settings["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in named}
        return settings
    if layout.format == "awq":
        head = {"lm_head": True} if HEAD in result.linears else {}
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": layout.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": named or None,
        } | head
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": bool(layout.sym),
        "strategy": "channel" if layout.group_size == -1 else "group",
        "group_size": None if layout.group_size == -1 else layout.group_size,
        "actorder": "group" if result.layout.desc_act else None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*(name for name in result.outside if name == HEAD), *left],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _by_block(result: Written) -> list[list[str]]:
    """The linears to quantize by their name inside a block, as transformers and vLLM want them."""
    pattern = re.compile(rf"^{re.escape(result.blocks)}\.\d+\.")
    inside = [name for name in result.linears if pattern.match(name)]
    return [[name] for name in dict.fromkeys(pattern.sub("", name) for name in inside)]


def marlin_settings(result: Written, origin: QuantizationConfig | None) -> QuantizationConfig:
    """The settings of a Marlin directory; `origin` if it was one before."""
    if origin is not None:
        return origin
    return QuantizationConfig(
        group_size=result.layout.group_size,
        sym=bool(result.layout.sym),
        desc_act=result.layout.desc_act,
        method="imported",
        preset="none",
        skip=skip_patterns(result),
        overrides=tuple(Override(f"^{re.escape(name)}$", 4, size) for name, size in result.sizes.items()),
    )


def skip_patterns(result: Written) -> tuple[str, ...]:
    """Patterns that match the kept linears and no other: one for those that every block keeps, else by full name."""
    start = re.compile(rf"^{re.escape(result.blocks)}\.\d+")
    quantized = {start.sub("", name) for name in result.linears}
    patterns: dict[str, None] = {}
    for name in result.kept:
        inner = start.sub("", name)
        uniform = inner != name and inner not in quantized
        patterns[f"{re.escape(inner)}$" if uniform else f"^{re.escape(name)}$"] = None
    return tuple(patterns)
