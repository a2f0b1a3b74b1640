"""Small quantized models in every format, for the tests of conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import save_tiny_model

from marlin_gptq import QuantizationConfig, convert_checkpoint, quantize_model
from marlin_gptq.checkpoint import TensorStore

FORMATS = ("gptq", "awq", "compressed-tensors")
IDS = torch.arange(1, 40)[None]


def convert(source: Path, to: str, **options: Any) -> Path:
    output = source.parent / f"{source.name}-{to}-{options.get('gptq_version', '')}"
    convert_checkpoint(source, output, to, **options)
    return output


def quantized(directory: Path, group_size: int = 32, skip: tuple[str, ...] = (), **changes: Any) -> Path:
    source = save_tiny_model(directory.parent / f"{directory.name}-base", **changes)
    config = QuantizationConfig(method="rtn", group_size=group_size, skip=skip)
    quantize_model(source, directory, config, [], device=torch.device("cpu"))
    return directory


def same(one: Path, other: Path) -> None:
    """Two directories hold the same tensors, dtype and bits, and the same settings."""
    a, b = TensorStore(one), TensorStore(other)
    assert sorted(a.names) == sorted(b.names)
    for name in a.names:
        assert a.dtype(name) == b.dtype(name), name
        assert torch.equal(a.get(name), b.get(name)), name


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits
