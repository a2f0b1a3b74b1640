"""The "quantization_config" of each format: what it says about the tensors, and how we write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marlin_gptq.config import GROUP_SIZES, QUANT_METHOD, QuantizationConfig
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.model_directory import read_json

ORIGINAL = "original"  # a state dict of the original Marlin repository, no directory
FORMATS = ("marlin", "gptq", "awq", "compressed-tensors")
HEAD = "lm_head"  # the name engines know the output head by
# Before config.json held them, the settings of GPTQ and AWQ had files of their own.
OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True)
class Layout:
    """How a directory stores its quantized linears.

    format      one of FORMATS, or ORIGINAL.
    group_size  128, 64, 32 or -1.
    sym         whether the settings claim a symmetric grid; None where they do not say.
    version     of the GPTQ layout: 1 stores zero points less one, 2 as they are.
    desc_act    whether the settings claim act-order: groups may have moved.
    """

    format: str
    group_size: int
    sym: bool | None = None
    version: int = 1
    desc_act: bool = False

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
    for name, method in OLD_FILES.items():
        if (directory / name).exists():
            return {"quant_method": method} | read_json(directory / name)
    return None


def layout_of(settings: dict[str, Any]) -> Layout:
    """What the settings say about the tensors. InputError, by name, for what neither format nor kernel holds."""
    method = settings.get("quant_method")
    if method is None and "w_bit" in settings:
        method = "awq"
    if method == QUANT_METHOD:
        own = QuantizationConfig.from_dict(settings)
        return Layout("marlin", own.group_size, own.sym, desc_act=own.desc_act)
    if method == "gptq":
        return _gptq(settings)
    if method == "awq":
        return _awq(settings)
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    raise InputError(
        f"quant_method: got {method!r}, which is none of those that can be read: {QUANT_METHOD} (marlin), gptq, awq, "
        "compressed-tensors"
    )


def _gptq(settings: dict[str, Any]) -> Layout:
    _require_bits(settings.get("bits"))
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise InputError(f"checkpoint_format: got {kind!r}, expected 'gptq' or 'gptq_v2'")
    if settings.get("is_marlin_format"):
        raise InputError("is_marlin_format: got true, an old mixed form of GPTQ and Marlin; expected plain GPTQ")
    _require(settings, "pack_dtype", ("int32", None))
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise InputError(f"dynamic: got {dynamic!r}, expected an object of patterns")
    if differing := [pattern for pattern in dynamic if not str(pattern).startswith("-:")]:
        raise InputError(
            f"dynamic: {differing[0]!r} changes settings for single layers; one bit width and group size is needed"
        )
    return Layout(
        "gptq",
        _group_size(settings.get("group_size")),
        _flag(settings, "sym"),
        2 if kind == "gptq_v2" else 1,
        bool(_flag(settings, "desc_act")),
    )


def _awq(settings: dict[str, Any]) -> Layout:
    _require_bits(settings.get("bits", settings.get("w_bit")))
    version = settings.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise InputError(f"version: got {version!r}, expected 'gemm': the other AWQ layouts are not read")
    return Layout("awq", _group_size(settings.get("group_size", settings.get("q_group_size"))))


def _compressed_tensors(settings: dict[str, Any]) -> Layout:
    _require(settings, "format", ("pack-quantized",))
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"config_groups: got {groups!r}, expected an object with at least one group")
    found = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise InputError(f"config_groups.{name}.weights: got {weights!r}, expected an object")
        for key in ("input_activations", "output_activations"):
            if group.get(key) is not None:
                raise InputError(f"config_groups.{name}.{key}: activations are quantized too; only weights may be")
        _require(group, "format", ("pack-quantized", None))
        _require_bits(weights.get("num_bits"))
        _require(weights, "type", ("int", None))
        _require(weights, "dynamic", (False, None))
        _require(weights, "strategy", ("group", "channel"))
        channel = weights["strategy"] == "channel"
        found.add((-1 if channel else _group_size(weights.get("group_size")), _flag(weights, "symmetric")))
    if len(found) > 1:
        raise InputError(f"config_groups: {len(found)} different settings; one group size for all layers is needed")
    ((group_size, symmetric),) = found
    return Layout("compressed-tensors", group_size, True if symmetric is None else symmetric)


def _require_bits(bits: Any) -> None:
    if type(bits) is not int or bits != 4:
        raise InputError(f"bits: got {bits!r}, only 4-bit codes can be held")


def _group_size(size: Any) -> int:
    if type(size) is not int or size not in GROUP_SIZES:
        raise InputError(f"group_size: got {size!r}, expected one of 128, 64, 32 or -1 (the whole row)")
    return size


def _flag(settings: dict[str, Any], key: str) -> bool | None:
    value = settings.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{key}: got {value!r}, expected true or false")
    return value


def _require(settings: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    value = settings.get(key)
    if not any(type(value) is type(one) and value == one for one in allowed):
        wanted = " or ".join(repr(one) for one in allowed if one is not None)
        raise InputError(f"{key}: got {value!r}, expected {wanted}")


@dataclass(frozen=True)
class Written:
    """What a result's settings have to say.

    layout   as the result is to be.
    kept     full names of the decoder linears that stay in 16 bits.
    outside  full names of the linears outside the decoder blocks that do: the head, as a rule.
    blocks   the name of the list of decoder blocks, `model.layers`.
    linears  full names of the quantized linears.
    damp_percent, true_sequential  of the quantization, None where unknown.
    """

    layout: Layout
    kept: tuple[str, ...]
    outside: tuple[str, ...]
    blocks: str
    linears: tuple[str, ...]
    damp_percent: float | None = None
    true_sequential: bool | None = None


def settings_for(result: Written) -> dict[str, Any]:
    """The "quantization_config" of a foreign format, with the fields that vLLM, SGLang and transformers read."""
    layout = result.layout
    left = [*(name for name in result.outside if name != HEAD), *result.kept]  # a vision part, and what was skipped
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
        if left:
            settings["modules_in_block_to_quantize"] = _by_block(result)
            settings["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
        return settings
    if layout.format == "awq":
        head = {"lm_head": True} if HEAD in result.linears else {}
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": layout.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left or None,
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
        "ignore": [*result.outside, *result.kept],
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
