"""The pack-quantized layout of compressed-tensors: codes ↔ words of eight along K, zero points along N.

K is in_features, N out_features; element i of a word sits in bits [4i, 4i+4). The tools call codes signed, −8 … 7,
and store them plus 8, which is our code.

    weight_packed      int32 [N, ⌈K/8⌉]         word (n, r) holds the codes of input features 8r … 8r+7 of output n
    weight_scale       16-bit float [N, groups]
    weight_shape       int64 [2]                N, K
    weight_zero_point  int32 [⌈N/8⌉, groups]    asymmetric only: word (c, g) holds the zero points of outputs 8c … 8c+7
    weight_g_idx       int32 [K]                act-order only: the group of each input feature

Axes that are no multiple of 8 are filled with nibbles of 0.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from marlin_gptq.formats.words import PER_WORD, pack_nibbles, unpack_nibbles


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K], values 0 … 15 → int32 [N, ⌈K/8⌉]."""
    return pack_nibbles(F.pad(codes, (0, -codes.shape[1] % PER_WORD)))


def unpack_codes(weight_packed: Tensor, in_features: int) -> Tensor:
    """Exact inverse of `pack_codes`: int32 [N, ⌈K/8⌉] → uint8 [N, K]."""
    return unpack_nibbles(weight_packed)[:, :in_features].contiguous()


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zero points uint8 [N, groups], values 0 … 15 → int32 [⌈N/8⌉, groups]."""
    return pack_codes(zeros.t().contiguous()).t().contiguous()


def unpack_zeros(weight_zero_point: Tensor, out_features: int) -> Tensor:
    """Exact inverse of `pack_zeros`: int32 [⌈N/8⌉, groups] → uint8 [N, groups]."""
    return unpack_codes(weight_zero_point.t(), out_features).t().contiguous()
