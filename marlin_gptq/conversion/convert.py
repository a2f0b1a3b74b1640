"""A quantized directory in one format → the same codes and scales in another, one linear in memory at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.conversion.linears import StoredLinear, exact_cast, refusal, with_scales, write_linear
from marlin_gptq.conversion.original import StateDictWriter, open_source
from marlin_gptq.conversion.parallel import split_problems, warnings_for
from marlin_gptq.conversion.reading import groups_of
from marlin_gptq.conversion.report import ConversionReport, conversion_card
from marlin_gptq.conversion.settings import (
    FORMATS,
    ORIGINAL,
    Layout,
    Written,
    marlin_settings,
    settings_for,
)
from marlin_gptq.conversion.source import Source
from marlin_gptq.conversion.survey import Survey, run_linear, survey
from marlin_gptq.destination import conversion_inputs
from marlin_gptq.disk import require_space
from marlin_gptq.errors import InputError
from marlin_gptq.model_directory import OLD_SETTINGS
from marlin_gptq.output_directory import CARD, LOG_FILE
from marlin_gptq.placement import Placement

HALF_SCALES = ("gptq", "awq", ORIGINAL)  # formats whose scales are float16
Progress = Callable[[int, int], None]


def convert_checkpoint(
    path: Path,
    output: Path,
    to: str,
    *,
    base: Path | None = None,
    gptq_version: int | None = None,
    name: str | None = None,
    shard_size: int = 10**9,
    overwrite: bool = False,
    progress: Progress | None = None,
    place: Placement | None = None,
) -> ConversionReport:
    """Convert the quantized directory `path` (Marlin, GPTQ, AWQ or compressed-tensors) to another format.

    output        the new directory; for the format `original` a file.
    to            one of FORMATS, or `original`: a state dict of the original Marlin repository.
    base          where `path` is such a state dict: the directory of the model it was made from.
    gptq_version  of a GPTQ result; by default 1 for a symmetric grid, which everything reads, and 2 for others.
    name          what the model card calls the source; by default the name of its directory.
    progress      called with (done, total) linears.
    place         a placement of `output` that was begun before.

    Codes, scales and zero points keep every bit; tensors that are not quantized are copied. All that the format cannot
    hold is found before anything is written: InputError names the first linear and what it is. CheckpointError for
    files that are damaged.
    """
    started = time.perf_counter()
    source = open_source(path, base)
    if source.settings.get("kv_cache_scheme"):
        raise InputError(
            f"{path}: kv_cache_scheme: the scales of a quantized KV cache have no place in the format {to}; set it to "
            "null in config.json to convert the weights alone"
        )
    found = survey(source)
    target = _target(source, found, to, gptq_version)
    scale_dtype = _require_held(source, found, target)
    bytes_before = sum(source.store.size(name) for name in source.store.names)
    require_space(output, bytes_before)
    writer: CheckpointWriter | StateDictWriter
    inputs = conversion_inputs(path, base)
    if to == ORIGINAL:
        writer = StateDictWriter(output, overwrite=overwrite, inputs=inputs)
    else:
        writer = CheckpointWriter(output, shard_size=shard_size, overwrite=overwrite, inputs=inputs, place=place)
    with writer:
        owner = {part: name for name in source.linears for part in source.parts(name)}
        others, done = set(source.others()), set[str]()
        for tensor in source.store.names:  # file by file, as stored
            owned_by = owner.get(tensor)
            if owned_by is None:
                if tensor in others:
                    writer.add(tensor, source.store.get(tensor))
            elif owned_by not in done:
                done.add(owned_by)
                linear = _with_dtype(run_linear(source, owned_by, found.scale_dtype), scale_dtype)
                for full, value in write_linear(owned_by, linear, target).items():
                    writer.add(full, value)
                if progress is not None:
                    progress(len(done), len(source.linears))
        report = ConversionReport(
            source=name or path.resolve().name,
            output=str(output),
            source_format=source.layout.title,
            format=target.title,
            linears=len(source.linears),
            group_size=target.group_size,
            symmetric=found.symmetric,
            act_order=bool(found.reordered),
            dtype=str(found.scale_dtype).removeprefix("torch."),
            bytes_before=bytes_before,
            bytes_after=writer.total_bytes,
            seconds=time.perf_counter() - started,
            warnings=_warnings(source, found, target),
        )
        if isinstance(writer, CheckpointWriter):
            _write_companions(writer, source, result_settings(source, target), report)
        writer.finish()
    return report


def _target(source: Source, found: Survey, to: str, gptq_version: int | None) -> Layout:
    """The layout of the result; InputError for none at all, or the one the source has."""
    if to not in (*FORMATS, ORIGINAL):
        raise InputError(f"format: got {to!r}, expected one of {', '.join((*FORMATS, ORIGINAL))}")
    if gptq_version is not None and to != "gptq":
        raise InputError(f"GPTQ version: got {gptq_version} for the format {to}, which has no versions")
    version = gptq_version or (1 if found.symmetric else 2)
    symmetric = found.symmetric or to == ORIGINAL  # which knows nothing else: `refusal` looks at the values
    target = Layout(to, source.layout.group_size, symmetric, version, desc_act=bool(found.reordered))
    if target.title == source.layout.title:
        other = " (or another --gptq-version)" if to == "gptq" else ""
        raise InputError(f"{source.path}: is in the format {target.title} already; give another one{other}")
    return target


def checked_target(source: Source, found: Survey) -> Layout:
    """The Marlin layout a source runs in; InputError for what is outside the decoder blocks."""
    target = replace(Layout("marlin", source.layout.group_size, found.symmetric), desc_act=bool(found.reordered))
    own = source.own
    if own is not None:  # its settings say what its files hold, also where the values could do with less
        target = replace(target, sym=own.sym, desc_act=own.desc_act)
    _require_held(source, found, target)
    return target


def _require_held(source: Source, found: Survey, target: Layout) -> torch.dtype:
    """The dtype of the result's scales; InputError naming the first linear that the format cannot hold."""
    outside = [name for name in source.linears if not source.architecture.in_blocks(name)]
    if target.format in ("marlin", ORIGINAL) and outside:
        raise InputError(f"{outside[0]}: is quantized, but the Marlin formats quantize linears of decoder blocks only")
    stored = torch.float16 if target.format in HALF_SCALES else found.scale_dtype
    for name in source.linears:
        linear = source.linear(name, with_codes=False)
        if target.format != "marlin":
            require_one_size(name, linear.weight.group_size, target)
        reason = refusal(linear, target, *source.architecture.shapes[name])
        if reason:
            raise InputError(f"{name}: {target.title} cannot hold {reason}")
        if exact_cast(linear.weight.scales, stored) is None:
            raise InputError(
                f"{name}: {target.title} stores float16 scales, and some of its {found.scale_dtype} scales change in "
                "float16; compressed-tensors and marlin keep them"
            )
    return stored


def require_one_size(name: str, group_size: int, target: Layout) -> None:
    """InputError for groups of another size than the rest, which only a Marlin directory of ours records."""
    if group_size != target.group_size:
        raise InputError(
            f"{name}: {target.title} cannot hold groups of {group_size} beside groups of {target.group_size}: it has "
            "one size for all linears; quantize again without the override, or keep the Marlin directory"
        )


def _with_dtype(linear: StoredLinear, dtype: torch.dtype) -> StoredLinear:
    scales = exact_cast(linear.weight.scales, dtype)
    assert scales is not None, "looked at before anything was written"
    return with_scales(linear, scales)


def result_settings(source: Source, target: Layout) -> dict[str, Any]:
    """The "quantization_config" of the result."""
    settings = source.settings
    damp, sequential = settings.get("damp_percent"), settings.get("true_sequential")
    found = source.architecture
    ours = target.format == "marlin"  # whose settings go by the model's own names
    written = Written(
        layout=target,
        kept=tuple(found.modules[name] for name in source.kept) if ours else source.kept,
        outside=tuple(name for name in found.shapes if not found.in_blocks(name) and name not in source.linears),
        blocks=found.blocks if ours else found.stored_blocks,
        linears=tuple(found.modules[name] for name in source.linears) if ours else source.linears,
        beside=_matrices_beside(source),
        sizes=_own_sizes(source) if ours and source.own is None else {},
        damp_percent=damp if isinstance(damp, float) else None,
        true_sequential=sequential if isinstance(sequential, bool) else None,
    )
    if ours:
        return marlin_settings(written, source.own).to_dict()
    result = settings_for(written)
    if settings.get("quant_method") == target.format == "gptq":  # another version of the same: the rest stays true
        stale = ("format", "dynamic", "modules_in_block_to_quantize")
        result = {key: value for key, value in settings.items() if key not in stale} | result
        result["static_groups"] = settings.get("static_groups", False)
    return result


def _matrices_beside(source: Source) -> tuple[str, ...]:
    """Names of the modules of decoder blocks that hold a matrix and are no linear: routers of experts."""
    held = [name.removesuffix(".weight") for name in source.others() if name.endswith(".weight")]
    inside = [name for name in held if name.startswith(f"{source.architecture.stored_blocks}.")]
    strange = [name for name in inside if name not in source.architecture.shapes]
    return tuple(name for name in strange if len(source.store.shape(f"{name}.weight")) == 2)


def _own_sizes(source: Source) -> dict[str, int]:
    """Group sizes of the linears that have another one than the rest: those whose last group was not full."""
    modules = source.architecture.modules
    sizes = {modules[name]: groups_of(source.architecture.shapes[name][1], source.layout)[1] for name in source.linears}
    return {name: size for name, size in sizes.items() if size != source.layout.group_size}


def engine_warnings(
    shapes: dict[str, tuple[int, int]], kept: tuple[str, ...], layout: Layout, config: Any
) -> list[str]:
    """What engines would stumble over in a result that is meant for them; nothing for a Marlin directory."""
    if layout.format in ("marlin", ORIGINAL):
        return []
    lines = warnings_for(split_problems(shapes, kept, layout.group_size, config))
    if layout.format == "gptq" and not layout.sym:
        lines.append("zero points: vLLM runs asymmetric GPTQ without its Marlin kernel; AWQ keeps it on that kernel")
    if layout.format == "compressed-tensors" and not layout.sym:
        lines.append(
            "zero points: transformers cannot load asymmetric compressed-tensors (tried with its package up to 0.20); "
            "vLLM and SGLang can, and transformers reads GPTQ and AWQ with zero points"
        )
    if layout.format == "compressed-tensors" and layout.desc_act:
        lines.append(
            "act-order: the compressed-tensors package reads weight_g_idx no longer (0.20 refuses it); GPTQ does"
        )
    return lines


def _warnings(source: Source, found: Survey, target: Layout) -> list[str]:
    shapes = {name: source.architecture.shapes[name] for name in source.linears}
    lines = engine_warnings(shapes, source.kept, target, source.architecture.config)
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    dtype = str(found.scale_dtype).removeprefix("torch.")
    if named != dtype:
        lines.append(f"dtype: config.json said {named}, the scales are {dtype}; the result runs in {dtype}")
    return lines


def _write_companions(
    writer: CheckpointWriter, source: Source, settings: dict[str, Any], report: ConversionReport
) -> None:
    stale = ("torch_dtype", "compression_config", "transformers_weights")
    config = {key: value for key, value in source.config.items() if key not in stale}
    config |= {"dtype": report.dtype, "quantization_config": settings}
    # The log of a quantization stays true of the codes, whatever holds them.
    log = () if source.layout.format == "marlin" else (LOG_FILE,)
    writer.copy_companions(source.directory, leave=("config.json", CARD, *log, *OLD_SETTINGS))
    writer.write_text("config.json", json.dumps(config, indent=2) + "\n")
    if settings["quant_method"] == "gptq":  # GPTQ's own tools look here first
        writer.write_text("quantize_config.json", json.dumps(settings, indent=2) + "\n")
    card = source.directory / CARD
    recipe = card.read_text("utf-8") if source.layout.format == "marlin" and card.is_file() else ""
    text = conversion_card(report, recipe)
    if source.layout.format != "marlin" and source.settings:  # also those that the result has no place for
        text += f"\n## Settings of the source\n\n```json\n{json.dumps(source.settings, indent=2)}\n```\n"
    writer.write_text(CARD, text)
