"""The run-time layout of Hopper GPUs: the words of the Marlin layout in blocks of 128 channels × 128 k.

blocks, int32 [⌈N/128⌉, ⌈K/128⌉, words]. One block is one contiguous copy, a multiple of 128 bytes:

    codes    8192 bytes       the words of the Marlin layout, moved as wholes (a nibble keeps its place in the word)
    scales   256 · 128/g      only with groups: for each group a row of 128 scales of 16 bits
    zeros    128 · rows       only asymmetric: for each group (per column: once) a row of 128 bytes, one zero point each

The word of (k, n), k and n counted within the block:

    word = 4·(32·(8·(k>>6) + (n>>4)) + 4·(n&7) + ((k>>1)&3)) + ((k>>4)&3)

    bit        10     9..7     6..4   3..2   1..0
    of         k      n        n      k      k
    bits       6      6..4     2..0   2..1   5..4

so the 16 bytes of lane 4·(n&7) + ((k>>1)&3) are its fragments of four consecutive steps of 16 k, for the same 16
channels. Scales and zero points of channel n = 16t + 8h + r stand at 2·(8t + r) + h: those of the two channels r and
r + 8 that one lane holds are neighbours, one 32-bit (scales) or 16-bit (zeros) load.

Where N or K is no multiple of 128 the rest of a block has code 8 and scale 0, or, asymmetric, code 0 and zero point 0.
Scales per column stay outside, in their natural order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.kernel.checks import GROUP_SIZES, TILE_K, TILE_N, dtype_name
from marlin_gptq.kernel.reference import scale_column, unpack_scales

BLOCK = 128  # channels, and k, of a block
CODE_WORDS = BLOCK * BLOCK // 8
_CODE_8 = 0x88888888 - 2**32  # eight codes of 8, as an int32
_DTYPES = (torch.float16, torch.bfloat16)


def scale_rows(k: int, group_size: int) -> int:
    """Rows of scales in each block: 128 / group_size, or 0 for one scale per column (group_size -1 or K)."""
    return 0 if group_size in (-1, k) else BLOCK // group_size


def block_words(k: int, group_size: int, asymmetric: bool) -> int:
    """32-bit words of one block."""
    rows = scale_rows(k, group_size)
    return CODE_WORDS + rows * BLOCK // 2 + (max(rows, 1) * BLOCK // 4 if asymmetric else 0)


def to_blocks(qweight: Tensor, scales: Tensor | None, qzeros: Tensor | None, group_size: int) -> Tensor:
    """The Marlin layout → blocks, on the same device.

    qweight int32 [K/16, 2N], K % 16 == 0, N % 64 == 0
    scales [K/g, N] float16 or bfloat16 in stored order; per column (group_size -1 or K) it is not looked at
    qzeros int32 [groups, N/8] or None (symmetric)
    → int32 [⌈N/128⌉, ⌈K/128⌉, block_words(K, group_size, qzeros is not None)]

    Raises TypeError (dtype) or ValueError (shape, group size), naming the argument.
    """
    k, n = _shape(qweight)
    groups = _groups(k, group_size)
    rows = scale_rows(k, group_size)
    if rows:
        _check_scales(scales, groups, n, qweight.device)
    if qzeros is not None:
        _check_zeros(qzeros, groups, n, qweight.device)
    n_blocks, k_blocks = -(-n // BLOCK), -(-k // BLOCK)

    padding = _CODE_8 if qzeros is None else 0
    words = _padded(qweight, k_blocks * 8, n_blocks * 2 * BLOCK, padding)
    # k6, k54 | n_hi, n6, n20, k21, n54
    fields = words.reshape(k_blocks, 2, 4, n_blocks, 2, 8, 4, 4)
    parts = [fields.permute(3, 0, 1, 4, 7, 5, 6, 2).reshape(n_blocks, k_blocks, CODE_WORDS)]
    if rows:
        assert scales is not None
        bits = _padded(scales.view(torch.int16), k_blocks * rows, n_blocks * BLOCK, 0)
        # k_hi, row | n_hi, n6, n20, n54, n3
        fields = bits.reshape(k_blocks, rows, n_blocks, 2, 8, 4, 2)
        ordered = fields.permute(2, 0, 1, 3, 5, 4, 6).reshape(n_blocks, k_blocks, rows * BLOCK)
        parts.append(ordered.contiguous().view(torch.int32))
    if qzeros is not None:
        repeated = qzeros if rows else qzeros.expand(k_blocks, -1)  # per column every block has them
        nibbles = _padded(repeated, k_blocks * max(rows, 1), n_blocks * BLOCK // 8, 0)
        values = (nibbles[..., None] >> (4 * torch.arange(8, device=qzeros.device, dtype=torch.int32))) & 15
        # k_hi, row | n_hi, n6, n20, n3, n5, n4
        fields = values.to(torch.uint8).reshape(k_blocks, max(rows, 1), n_blocks, 2, 8, 2, 2, 2)
        ordered = fields.permute(2, 0, 1, 3, 6, 7, 4, 5).reshape(n_blocks, k_blocks, max(rows, 1) * BLOCK)
        parts.append(ordered.contiguous().view(torch.int32))
    return torch.cat(parts, dim=-1).contiguous()


def from_blocks(
    blocks: Tensor, n: int, k: int, group_size: int, asymmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Exact inverse of `to_blocks`: (qweight, scales or None per column, qzeros or None).

    dtype: float16 or bfloat16, what the 16-bit scales are; the blocks do not tell.
    Raises TypeError (dtype) or ValueError (shape, group size), naming the argument.
    """
    groups = check_blocks(blocks, n, k, group_size, asymmetric)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected torch.float16 or torch.bfloat16")
    rows = scale_rows(k, group_size)
    n_blocks, k_blocks = blocks.shape[0], blocks.shape[1]
    # n_hi, k_hi, k6, n6, n54, n20, k21, k54
    fields = blocks[..., :CODE_WORDS].reshape(n_blocks, k_blocks, 2, 2, 4, 8, 4, 4)
    words = fields.permute(1, 2, 7, 0, 3, 5, 6, 4).reshape(k_blocks * 8, n_blocks * 2 * BLOCK)
    qweight = words[: k // TILE_K, : 2 * n].contiguous()

    scales = qzeros = None
    behind = CODE_WORDS + rows * BLOCK // 2
    if rows:
        bits = blocks[..., CODE_WORDS:behind].contiguous().view(torch.int16)
        # n_hi, k_hi, row, n6, n54, n20, n3
        fields = bits.reshape(n_blocks, k_blocks, rows, 2, 4, 8, 2)
        stored = fields.permute(1, 2, 0, 3, 5, 4, 6).reshape(k_blocks * rows, n_blocks * BLOCK)
        scales = stored[:groups, :n].contiguous().view(dtype)
    if asymmetric:
        values = blocks[..., behind:].contiguous().view(torch.uint8)
        # n_hi, k_hi, row, n6, n5, n4, n20, n3
        fields = values.reshape(n_blocks, k_blocks, max(rows, 1), 2, 2, 2, 8, 2)
        nibbles = fields.permute(1, 2, 0, 3, 6, 7, 4, 5).reshape(-1, n_blocks * BLOCK // 8, 4, 2)
        # By shifts, for torch.compile views bytes as words only where it happens to lay them out so (seen in 2.11).
        octets = (nibbles[..., 0] | (nibbles[..., 1] << 4)).to(torch.int32)
        words = octets[..., 0] | (octets[..., 1] << 8) | (octets[..., 2] << 16) | (octets[..., 3] << 24)
        qzeros = words[:groups, : n // 8].contiguous()
    return qweight, scales, qzeros


def natural_scales(scales: Tensor) -> Tensor:
    """Per-column scales [1, N] in stored order → [N] in the order of the channels, as the blocked kernel takes them."""
    return unpack_scales(scales)[0].contiguous()


def stored_scales(natural: Tensor) -> Tensor:
    """Exact inverse of `natural_scales`: [N] → [1, N]."""
    stored = torch.empty_like(natural)
    stored[scale_column(torch.arange(natural.shape[0], device=natural.device), 1)] = natural
    return stored[None]


def check_blocks(blocks: Tensor, n: int, k: int, group_size: int, asymmetric: bool) -> int:
    """The number of groups of scales, or TypeError or ValueError where blocks do not hold such a weight."""
    if n <= 0 or n % TILE_N:
        raise ValueError(f"n: got {n}, expected a positive multiple of {TILE_N}")
    if k <= 0 or k % TILE_K:
        raise ValueError(f"k: got {k}, expected a positive multiple of {TILE_K}")
    groups = _groups(k, group_size)
    if blocks.dtype != torch.int32:
        raise TypeError(f"blocks: got {dtype_name(blocks.dtype)}, expected int32")
    expected = [-(-n // BLOCK), -(-k // BLOCK), block_words(k, group_size, asymmetric)]
    if list(blocks.shape) != expected:
        kind = "with zero points" if asymmetric else "without zero points"
        raise ValueError(
            f"blocks: got {list(blocks.shape)}, expected {expected} (N = {n}, K = {k}, group_size {group_size}, {kind})"
        )
    return groups


def _shape(qweight: Tensor) -> tuple[int, int]:
    if qweight.dtype != torch.int32:
        raise TypeError(f"qweight: got {dtype_name(qweight.dtype)}, expected int32")
    if qweight.dim() != 2 or not qweight.numel() or qweight.shape[1] % (2 * TILE_N):
        raise ValueError(
            f"qweight: got {list(qweight.shape)}, expected [K/16, 2N] with K > 0 and N a multiple of {TILE_N}"
        )
    return qweight.shape[0] * TILE_K, qweight.shape[1] // 2


def _groups(k: int, group_size: int) -> int:
    if group_size in (-1, k):
        return 1
    if group_size not in GROUP_SIZES or k % group_size:
        raise ValueError(f"group_size: got {group_size}, expected -1, K or one of 32, 64 and 128 that divides K = {k}")
    return k // group_size


def _check_scales(scales: Tensor | None, groups: int, n: int, device: torch.device) -> None:
    if scales is None:
        raise ValueError(f"scales: got None, expected {[groups, n]} float16 or bfloat16")
    if scales.dtype not in _DTYPES:
        raise TypeError(f"scales: got {list(scales.shape)} {dtype_name(scales.dtype)}, expected float16 or bfloat16")
    if scales.shape != (groups, n):
        raise ValueError(f"scales: got {list(scales.shape)}, expected {[groups, n]}")
    if scales.device != device:
        raise ValueError(f"scales: got device {scales.device}, expected {device} (the device of qweight)")


def _check_zeros(qzeros: Tensor, groups: int, n: int, device: torch.device) -> None:
    if qzeros.dtype != torch.int32:
        raise TypeError(
            f"qzeros: got {list(qzeros.shape)} {dtype_name(qzeros.dtype)}, expected {[groups, n // 8]} int32"
        )
    if qzeros.shape != (groups, n // 8):
        raise ValueError(f"qzeros: got {list(qzeros.shape)}, expected {[groups, n // 8]} int32")
    if qzeros.device != device:
        raise ValueError(f"qzeros: got device {qzeros.device}, expected {device} (the device of qweight)")


def _padded(tensor: Tensor, rows: int, columns: int, value: int) -> Tensor:
    """The tensor with rows and columns of `value` behind it."""
    missing = (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])
    return torch.nn.functional.pad(tensor, missing, value=value) if any(missing) else tensor
