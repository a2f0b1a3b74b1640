"""The layout that weights have while a model runs, where it is another than that of the file.

GPUs of compute capability 9.0 read weights in blocks (`marlin_gptq.kernel.blocked`), a permutation of the Marlin
layout's words. A MarlinLinear there keeps the blocks in place of its tensors and gives these back, bit for bit,
whenever they are asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marlin_gptq.kernel import blocked, gemm_blocked, why_not_blocked


class Blocks(NamedTuple):
    """words: int32 blocks. scales: [N] in natural order where there is one scale per column, else None. The rest says
    how to read them: N and K as stored, the group size as the kernel counts (-1 per column), whether there are zero
    points, and the dtype of the scales."""

    words: Tensor
    scales: Tensor | None
    n: int
    k: int
    group_size: int
    asymmetric: bool
    dtype: torch.dtype


def wanted(device: torch.device) -> bool:
    """Whether weights on this device are to lie in blocks."""
    return device.type == "cuda" and not why_not_blocked(device.index)


def to_blocks(tensors: dict[str, Tensor], group_size: int) -> Blocks:
    """From qweight, scales and qzeros as a MarlinLinear stores them."""
    qweight, scales, zeros = tensors["qweight"], tensors["scales"], tensors.get("qzeros")
    per_column = scales.shape[0] == 1
    group_size = -1 if per_column else group_size
    words = blocked.to_blocks(qweight, scales, zeros, group_size)
    natural = blocked.natural_scales(scales) if per_column else None
    k, n = 16 * qweight.shape[0], scales.shape[1]
    return Blocks(words, natural, n, k, group_size, zeros is not None, scales.dtype)


def from_blocks(blocks: Blocks) -> dict[str, Tensor]:
    """Exact inverse of `to_blocks`."""
    words, natural, n, k, group_size, asymmetric, dtype = blocks
    qweight, scales, zeros = blocked.from_blocks(words, n, k, group_size, asymmetric, dtype)
    stored = scales if natural is None else blocked.stored_scales(natural)
    tensors = {"qweight": qweight, "scales": stored, "qzeros": zeros}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def gemm(rows: Tensor, blocks: Blocks, bias: Tensor | None) -> Tensor:
    """rows [M, K] · W (+ bias [N]) → [M, N]. TypeError unless rows have the dtype of the scales.

    Blocks are words: what their scales are is known here alone, and read as another type they would be other numbers.
    """
    if rows.dtype != blocks.dtype:
        got, needed = (str(dtype).removeprefix("torch.") for dtype in (blocks.dtype, rows.dtype))
        raise TypeError(f"scales: got blocks of {got}, expected scales of {needed} (the dtype of a)")
    found: Tensor = gemm_blocked(
        rows,
        blocks.words,
        blocks.scales,
        bias,
        n=blocks.n,
        group_size=blocks.group_size,
        asymmetric=blocks.asymmetric,
    )
    return found
