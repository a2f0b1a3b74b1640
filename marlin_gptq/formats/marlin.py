"""The Marlin layout: codes and scales ↔ the words a GPU warp loads in one piece.

Source: Frantar et al., "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language Models"
(arXiv 2408.11743). K is in_features, N out_features.

Weights, int32 [K/16, 2N]. A tile of 16 (k) × 64 (n) codes is 128 consecutive words; lane l of a warp owns words
4l … 4l+3, so one 16-byte load feeds one 16×16 matrix fragment per word:

    word = 128·(n>>6) + 16·(n&7) + 4·((k>>1)&3) + ((n>>4)&3)         row = k>>4
    nibble = 4·(k&1) + 2·((n>>3)&1) + ((k>>3)&1)                     bits [4·nibble, 4·nibble+4)

The nibbles of one word, by the (k, n) they hold relative to its first code, high bits on the left:

    nibble      7       6       5       4       3       2       1       0
    (k, n)    9, 8    1, 8    9, 0    1, 0    8, 8    0, 8    8, 0    0, 0

so `(word >> 4·t) & 0x000f000f` is a pair (k even, k odd) of one row: just what a matrix instruction takes.
Seen as bit fields, both indices are a permutation of the bits of k and n. Packing is therefore one reshape to
those bits, one permute and one shift-and-add, on whatever device the codes are.

Scales, [groups, N] in the dtype of the model. With more than one group, each 64 columns are transposed as 8×8
(one 16-byte load gives a lane the scales of its 8 rows); a single group (per column) follows the order of the
accumulator fragment, where pairs of neighbouring columns stay together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.formats.words import pack_nibbles, unpack_nibbles

TILE_K = 16
TILE_N = 64
ZERO_CODE = 8

# (k>>4) | k3 | k2..k1 | k0 against (n>>6) | n5..n4 | n3 | n2..n0, named by position in the reshape below.
_CODES_SHAPE = (-1, 4, 2, 8, -1, 2, 4, 2)  # n_hi, n54, n3, n20, k_hi, k3, k21, k0
_WORD_ORDER = (4, 0, 3, 6, 1, 7, 2, 5)  # row: k_hi; word: n_hi, n20, k21, n54; nibble: k0, n3, k3
_CODE_ORDER = (1, 4, 6, 2, 0, 7, 3, 5)  # inverse permutation


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K], values 0 … 15 → int32 [K/16, 2N]. K % 16 == 0 and N % 64 == 0, else ValueError."""
    n, k = codes.shape
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes: got {codes.dtype}, expected torch.uint8")
    if k % TILE_K or n % TILE_N:
        raise ValueError(f"codes: got [{n}, {k}], expected [N, K] with N % {TILE_N} == 0 and K % {TILE_K} == 0")
    fields = codes.reshape(n // TILE_N, *_CODES_SHAPE[1:4], k // TILE_K, *_CODES_SHAPE[5:])
    return pack_nibbles(fields.permute(_WORD_ORDER).reshape(k // TILE_K, 16 * n))


def unpack_codes(qweight: Tensor) -> Tensor:
    """Exact inverse of `pack_codes`: int32 [K/16, 2N] → uint8 [N, K]."""
    rows, words = qweight.shape
    if qweight.dtype != torch.int32:
        raise ValueError(f"qweight: got {qweight.dtype}, expected torch.int32")
    if words % (2 * TILE_N):
        raise ValueError(f"qweight: got [{rows}, {words}], expected [K/16, 2N] with N % {TILE_N} == 0")
    fields = unpack_nibbles(qweight).reshape(rows, words // (2 * TILE_N), 8, 4, 4, 2, 2, 2)
    return fields.permute(_CODE_ORDER).reshape(words // 2, rows * TILE_K)


def pack_scales(scales: Tensor) -> Tensor:
    """Scales [N, groups] (any float dtype) → [groups, N] in stored order. N % 64 == 0, else ValueError."""
    n, groups = scales.shape
    if n % TILE_N:
        raise ValueError(f"scales: got [{n}, {groups}], expected [N, groups] with N % {TILE_N} == 0")
    return scales.t()[:, _stored_columns(n, groups, scales.device)].contiguous()


def unpack_scales(stored: Tensor) -> Tensor:
    """Exact inverse of `pack_scales`: [groups, N] in stored order → [N, groups]."""
    groups, n = stored.shape
    if n % TILE_N:
        raise ValueError(f"scales: got [{groups}, {n}], expected [groups, N] with N % {TILE_N} == 0")
    plain = torch.empty_like(stored)
    plain[:, _stored_columns(n, groups, stored.device)] = stored
    return plain.t().contiguous()


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zero points uint8 [N, groups], values 0 … 15 → int32 [groups, N/8] (the layout vLLM's Marlin reads).

    word = 8·(n>>6) + (n&7), nibble = 4·((n>>3)&1) + 2·((n>>5)&1) + ((n>>4)&1).
    """
    n, groups = zeros.shape
    if n % TILE_N:
        raise ValueError(f"zeros: got [{n}, {groups}], expected [N, groups] with N % {TILE_N} == 0")
    fields = zeros.t().reshape(groups, n // TILE_N, 2, 2, 2, 8)  # n_hi, n5, n4, n3, n20
    return pack_nibbles(fields.permute(0, 1, 5, 4, 2, 3).reshape(groups, n))


def unpack_zeros(packed: Tensor) -> Tensor:
    """Exact inverse of `pack_zeros`: int32 [groups, N/8] → uint8 [N, groups]."""
    groups, words = packed.shape
    fields = unpack_nibbles(packed).reshape(groups, words // 8, 8, 2, 2, 2)  # n_hi, n20, n3, n5, n4
    return fields.permute(0, 1, 4, 5, 3, 2).reshape(groups, words * 8).t().contiguous()


def _stored_columns(n: int, groups: int, device: torch.device) -> Tensor:
    """Output channel held by each stored column, int64 [N]."""
    channels = torch.arange(n, device=device)
    if groups > 1:
        return channels.reshape(-1, 8, 8).transpose(1, 2).reshape(-1)
    # stored = 32·(n>>5) + 8·((n>>1)&3) + 2·((n>>3)&3) + (n&1)
    return channels.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(-1)
