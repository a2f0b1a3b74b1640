"""`marlin-quantize --format`: a model quantized straight into another format than Marlin.

A run ends in a Marlin directory under a temporary name beside the output, which is then converted and removed: so every
recipe reaches every format. What the format cannot hold is known from shapes and settings alone, and is refused before
the work, not after it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.conversion.convert import (
    HALF_SCALES,
    ConversionReport,
    Progress,
    convert_checkpoint,
    engine_warnings,
    require_one_size,
)
from marlin_gptq.conversion.settings import Layout
from marlin_gptq.conversion.source import architecture
from marlin_gptq.errors import CheckpointError, InputError, MarlinGPTQError


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


def staging_directory(output: Path) -> Path:
    """Where the Marlin directory of a run stands until it is converted."""
    return output.absolute().parent / f".{output.name}.marlin"


def convert_staged(
    output: Path, to: str, *, shard_size: int, overwrite: bool, progress: Progress | None = None
) -> ConversionReport:
    """Convert the Marlin directory in `staging_directory(output)` into `output`, and remove it.

    If that fails, it stays, and the error says where: the work is not lost.
    """
    staging = staging_directory(output)
    try:
        report = convert_checkpoint(
            staging, output, to, name=output.name, shard_size=shard_size, overwrite=overwrite, progress=progress
        )
    except (MarlinGPTQError, OSError) as error:
        raise CheckpointError(
            f"{error}; the quantized model itself is safe in the Marlin directory {staging}"
        ) from error
    shutil.rmtree(staging, ignore_errors=True)
    return report
