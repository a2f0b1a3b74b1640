"""The slow, obvious twin of the kernel: the layout as closed formulas, in plain torch on any device.

The format is that of Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large
Language Models" (arXiv 2408.11743). `k` counts input channels, `n` output channels; q(k, n) is a code of 4
bits and the weight is scale · (q − 8), or scale · (q − zero) where zero points are given.

    word(k, n)   = 128·(n>>6) + 16·(n&7) + 4·((k>>1)&3) + ((n>>4)&3)      in row k>>4 of qweight [K/16, 2N]
    nibble(k, n) = 4·(k&1) + 2·((n>>3)&1) + ((k>>3)&1)                    bits [4·nibble, 4·nibble + 4)
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_word(k: Tensor, n: Tensor) -> Tensor:
    """Index of the word, within row k>>4, that holds the code of (k, n)."""
    return 128 * (n >> 6) + 16 * (n & 7) + 4 * ((k >> 1) & 3) + ((n >> 4) & 3)


def weight_nibble(k: Tensor, n: Tensor) -> Tensor:
    """Which four bits of that word, counted from the lowest."""
    return 4 * (k & 1) + 2 * ((n >> 3) & 1) + ((k >> 3) & 1)


def scale_column(n: Tensor, groups: int) -> Tensor:
    """Stored column of channel n: 8×8 transposed with several groups, in accumulator order with one."""
    if groups > 1:
        return 64 * (n >> 6) + 8 * (n & 7) + ((n >> 3) & 7)
    return 32 * (n >> 5) + 8 * ((n >> 1) & 3) + 2 * ((n >> 3) & 3) + (n & 1)


def zero_word(n: Tensor) -> Tensor:
    """Index of the word, within a row of the zero points [groups, N/8], that holds those of channel n."""
    return 8 * (n >> 6) + (n & 7)


def zero_nibble(n: Tensor) -> Tensor:
    """Which four bits of that word."""
    return 4 * ((n >> 3) & 1) + 2 * ((n >> 5) & 1) + ((n >> 4) & 1)


def unpack_codes(qweight: Tensor) -> Tensor:
    """int32 [K/16, 2N] → codes int32 [K, N]."""
    rows, n_total = qweight.shape[0], qweight.shape[1] // 2
    k = torch.arange(16, device=qweight.device)[:, None]
    n = torch.arange(n_total, device=qweight.device)[None, :]
    words = qweight[:, weight_word(k, n).reshape(-1)].reshape(rows, 16, n_total)
    return ((words >> (4 * weight_nibble(k, n)).int()) & 15).reshape(16 * rows, n_total)


def unpack_scales(scales: Tensor) -> Tensor:
    """Stored scales [groups, N] → the same, channels in their natural order."""
    n = torch.arange(scales.shape[1], device=scales.device)
    return scales[:, scale_column(n, scales.shape[0])]


def unpack_zeros(zeros: Tensor) -> Tensor:
    """Stored zero points int32 [groups, N/8] → int32 [groups, N]."""
    n = torch.arange(8 * zeros.shape[1], device=zeros.device)
    return (zeros[:, zero_word(n)] >> (4 * zero_nibble(n)).int()) & 15


def dequantize(qweight: Tensor, scales: Tensor, group_size: int, zeros: Tensor | None = None) -> Tensor:
    """The weight as float32 [N, K]: exact, since a code times a scale has at most 15 significant bits.

    qweight int32 [K/16, 2N]; scales [groups, N] (float16 or bfloat16, stored order); group_size -1 or the
    number of k per row of scales; zeros int32 [groups, N/8] or None for a zero point of 8 everywhere.
    """
    codes = unpack_codes(qweight)
    size = codes.shape[0] if group_size == -1 else group_size
    natural = unpack_scales(scales).float().repeat_interleave(size, dim=0)
    offset = 8 if zeros is None else unpack_zeros(zeros).repeat_interleave(size, dim=0)
    return ((codes - offset) * natural).t().contiguous()


def gemm_reference(
    a: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    group_size: int = -1,
    qzeros: Tensor | None = None,
) -> Tensor:
    """a [M, K] · weightᵀ (+ bias [N]) in float32, rounded once to the dtype of a: [M, N]."""
    product = a.float() @ dequantize(qweight, scales, group_size, qzeros).t()
    if bias is not None:
        product = product + bias.float()
    return product.to(a.dtype)
