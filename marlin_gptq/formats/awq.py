"""The AWQ layout (its version "gemm"): codes and zero points ↔ words of eight along N, in an order of their own.

K is in_features, N out_features. The bits [4i, 4i+4) of word c hold column 8c + ORDER[i]:

    bits      28–31  24–27  20–23  16–19  12–15   8–11    4–7    0–3
    column        7      5      3      1      6      4      2      0

    qweight  int32 [K, N/8]
    qzeros   int32 [groups, N/8]    the zero points themselves
    scales   float16 [groups, N]

The layout is that of the checkpoints of Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration" (arXiv 2306.00978).
"""

from __future__ import annotations

from torch import Tensor

from marlin_gptq.formats.words import pack_nibbles, unpack_nibbles

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K], values 0 … 15 → int32 [K, N/8]. N % 8 == 0, else ValueError."""
    return pack_nibbles(codes.t().contiguous(), ORDER)


def unpack_codes(qweight: Tensor) -> Tensor:
    """Exact inverse of `pack_codes`: int32 [K, N/8] → uint8 [N, K]."""
    return unpack_nibbles(qweight, ORDER).t().contiguous()


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zero points uint8 [N, groups], values 0 … 15 → int32 [groups, N/8]. N % 8 == 0, else ValueError."""
    return pack_codes(zeros)


def unpack_zeros(qzeros: Tensor) -> Tensor:
    """Exact inverse of `pack_zeros`: int32 [groups, N/8] → uint8 [N, groups]."""
    return unpack_codes(qzeros)
