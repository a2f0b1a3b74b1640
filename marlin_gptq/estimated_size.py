"""The tensors that a run will write and their bytes, before it is started. Pure functions of an `Outline`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from marlin_gptq.modeling.linear import padded_features
from marlin_gptq.modeling.outline import LinearOutline, Outline
from marlin_gptq.quantization.weight import columns_per_group


def stored_tensors(
    outline: Outline, dtype: str, stored_bytes: int = 2
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, type, shape as in the model, bytes in the file) of every tensor of the result."""
    for name, shape in outline.outer:
        yield name, dtype, shape, prod(shape) * stored_bytes
    for block in outline.blocks:
        for name, shape in block.others:
            yield name, dtype, shape, prod(shape) * stored_bytes
        for linear in block.linears:
            shape = (linear.out_features, linear.in_features)
            if linear.group_size is None:
                yield f"{linear.name}.weight", dtype, shape, prod(shape) * stored_bytes
            else:
                group = "row" if linear.group_size == -1 else str(linear.group_size)
                yield linear.name, f"int4, group {group}", shape, packed_bytes(linear, stored_bytes)
            if linear.bias:
                yield f"{linear.name}.bias", dtype, shape[:1], linear.out_features * stored_bytes


def packed_bytes(linear: LinearOutline, stored_bytes: int = 2) -> int:
    """Codes and scales of a quantized linear in the Marlin layout."""
    assert linear.group_size is not None
    k, n = padded_features(linear.in_features, linear.out_features)
    groups = linear.in_features // columns_per_group(linear.in_features, linear.group_size)
    return k * n // 2 + groups * n * stored_bytes


def output_bytes(outline: Outline, stored_bytes: int = 2) -> int:
    """Bytes of all tensors of the result."""
    return sum(size for *_, size in stored_tensors(outline, "", stored_bytes))
