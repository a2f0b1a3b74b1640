"""`marlin-quantize --format`: a model quantized straight into another format than Marlin.

A run ends in a Marlin directory in a temporary folder beside the output, which is then converted and removed: so every
recipe reaches every format. What the format cannot hold is known from shapes and settings alone, and is refused before
the work, not after it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.conversion.convert import (
    HALF_SCALES,
    Progress,
    convert_checkpoint,
    engine_warnings,
    require_one_size,
)
from marlin_gptq.conversion.report import ConversionReport
from marlin_gptq.conversion.settings import Layout
from marlin_gptq.conversion.source import architecture
from marlin_gptq.errors import CheckpointError, InputError, MarlinGPTQError
from marlin_gptq.placement import Placement, TakenError


def require_exportable(model_dir: Path, config: QuantizationConfig, to: str, dtype: torch.dtype) -> list[str]:
    """What engines would stumble over in the result; InputError, before any work, for what the format cannot hold."""
    if to == "marlin":
        return []
    if to in HALF_SCALES and dtype != torch.float16:
        raise InputError(
            f"--format {to}: it stores float16 scales, and the result would be {str(dtype).removeprefix('torch.')}; "
            "use --dtype float16, or --format compressed-tensors"
        )
    found = architecture(model_dir, TensorStore(model_dir).names)
    shapes = {name: shape for name, shape in found.shapes.items() if found.in_blocks(name)}
    kept = tuple(name for name in shapes if config.skips(found.modules[name]))
    quantized = {name: shape for name, shape in shapes.items() if name not in kept}
    target = Layout(to, config.group_size, True)
    for name in quantized:
        require_one_size(name, config.group_size_of(found.modules[name]), target)
    if to in HALF_SCALES:
        for name, (n, k) in quantized.items():
            if n % 8 or k % 8:
                raise InputError(
                    f"{name}: {to} cannot hold its shape [{n}, {k}]: words hold 8 values; --skip it, or use --format "
                    "compressed-tensors"
                )
    return engine_warnings(quantized, kept, target, found.config)


def convert_aside(place: Placement, to: str, *, shard_size: int, progress: Progress | None = None) -> ConversionReport:
    """Convert the Marlin directory `place.aside()` into the output of `place`.

    If that fails, the Marlin directory is kept beside the output, and the error says where: the work is not lost.
    """
    made, output = place.aside(), place.output
    try:
        return convert_checkpoint(
            made, output, to, name=output.name, shard_size=shard_size, progress=progress, place=place
        )
    except TakenError:
        raise  # the result itself is kept
    except (MarlinGPTQError, OSError) as error:
        kept = place.keep(made, "marlin")
        raise CheckpointError(f"{error}; the quantized model itself is safe in the Marlin directory {kept}") from error
