"""The GPTQ layout: codes and zero points ↔ words of eight along K (codes) or N (zero points).

K is in_features, N out_features; element i of a word sits in bits [4i, 4i+4).

    qweight  int32 [K/8, N]         word (r, n) holds the codes of input features 8r … 8r+7 of output n
    qzeros   int32 [groups, N/8]    word (g, c) holds the zero points of outputs 8c … 8c+7
    scales   float16 [groups, N]
    g_idx    int32 [K]              the group of each input feature; k // group_size unless act-order moved it

Version 1 files store each zero point less one, so that symmetric files are full of 0x77777777; version 2 files
(`checkpoint_format: gptq_v2`) store it as it is, 0x88888888. A version 1 file has no nibble for the zero point 0:
programs disagree on what a stored 15 means (0 or 16). It is read as 0 here and never written.

The layout is that of the checkpoints of Frantar et al., "GPTQ" (arXiv 2210.17323), as the tools built on it publish
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.formats.words import pack_nibbles, unpack_nibbles

VERSIONS = (1, 2)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K], values 0 … 15 → int32 [K/8, N]. K % 8 == 0, else ValueError."""
    return pack_nibbles(codes).t().contiguous()


def unpack_codes(qweight: Tensor) -> Tensor:
    """Exact inverse of `pack_codes`: int32 [K/8, N] → uint8 [N, K]."""
    return unpack_nibbles(qweight.t())


def pack_zeros(zeros: Tensor, version: int) -> Tensor:
    """Zero points uint8 [N, groups], values 0 … 15 → int32 [groups, N/8]. N % 8 == 0, else ValueError.

    ValueError too for a zero point of 0 in version 1.
    """
    _require_version(version)
    if version == 1:
        if zeros.numel() and int(zeros.min()) == 0:
            raise ValueError("zeros: got a zero point of 0, which version 1 cannot hold; use version 2")
        zeros = zeros - 1
    return pack_nibbles(zeros.t().contiguous())


def unpack_zeros(qzeros: Tensor, version: int) -> Tensor:
    """Exact inverse of `pack_zeros`: int32 [groups, N/8] → uint8 [N, groups]; a 15 of version 1 is read as 0."""
    _require_version(version)
    stored = unpack_nibbles(qzeros)
    zeros = (stored + 1) & 0xF if version == 1 else stored
    return zeros.t().contiguous()


def plain_groups(in_features: int, groups: int) -> Tensor:
    """The g_idx of groups that keep their place, int32 [in_features]."""
    return (torch.arange(in_features) // (in_features // groups)).to(torch.int32)


def order_of_groups(g_idx: Tensor, groups: int) -> Tensor | None:
    """The input features in the order of their groups, int32 [K], or None if every group is in its place already.

    Column j of the sorted weight is input feature order[j], and belongs to group j // (K / groups); features of one
    group keep their order, so that `groups_of_order` gives back g_idx exactly. ValueError for a g_idx that no such
    order exists for: a group number outside 0 … groups − 1, or groups of different sizes.
    """
    k = g_idx.numel()
    if k and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise ValueError(
            f"g_idx: got groups {int(g_idx.min())} to {int(g_idx.max())}, expected 0 to {groups - 1}, one for each "
            "row of scales"
        )
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    if k % groups or bool((sizes != k // groups).any()):
        raise ValueError(
            f"g_idx: got groups of {int(sizes.min())} to {int(sizes.max())} input features, expected {k / groups:g} "
            "in each: only whole groups can be put in order"
        )
    order = torch.argsort(g_idx, stable=True).to(torch.int32)
    return None if torch.equal(order, torch.arange(k, dtype=torch.int32)) else order


def groups_of_order(order: Tensor, groups: int) -> Tensor:
    """Exact inverse of `order_of_groups`: int32 [K] → g_idx int32 [K]."""
    g_idx = torch.empty_like(order, dtype=torch.int32)
    g_idx[order.long()] = plain_groups(order.numel(), groups)
    return g_idx


def _require_version(version: int) -> None:
    if version not in VERSIONS:
        raise ValueError(f"version: got {version}, expected 1 or 2")
