"""Nibbles ↔ 32-bit words along one axis: what the plain formats share."""

from __future__ import annotations

import torch
from torch import Tensor

PER_WORD = 8
IN_ORDER = tuple(range(PER_WORD))


def pack_nibbles(values: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """uint8 [..., 8·w], values 0 … 15 → int32 [..., w]; bits [4i, 4i+4) of a word hold its value order[i].

    ValueError if the last axis is no multiple of 8 or a value exceeds 15.
    """
    if values.dtype != torch.uint8 or values.shape[-1] % PER_WORD:
        raise ValueError(f"values: got {list(values.shape)} {values.dtype}, expected [..., 8·w] torch.uint8")
    if values.numel() and int(values.max()) > 15:
        raise ValueError(f"values: got a value of {int(values.max())}, expected 0 … 15")
    nibbles = values.reshape(*values.shape[:-1], -1, PER_WORD)
    if order != IN_ORDER:
        nibbles = nibbles[..., list(order)]
    # Two nibbles make a byte and four bytes, lowest first, one little-endian word: no 64-bit temporaries.
    octets = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return octets.contiguous().view(torch.int32).squeeze(-1)


def unpack_nibbles(words: Tensor, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """Exact inverse of `pack_nibbles`: int32 [..., w] → uint8 [..., 8·w]."""
    if words.dtype != torch.int32:
        raise ValueError(f"words: got {words.dtype}, expected torch.int32")
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)
    nibbles = torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(-2)
    if order == IN_ORDER:
        return nibbles.flatten(-2)
    values = torch.empty_like(nibbles)
    values[..., list(order)] = nibbles
    return values.flatten(-2)
