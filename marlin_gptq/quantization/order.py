"""Act-order with static groups: GPTQ takes the columns that matter most first, each with the scale of its own group.

The columns quantized last have few left to push their error onto, so those with the largest diagonal of H go first
(the act-order of the GPTQ authors' code). Groups are those of the original places, so nothing is gathered at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def column_order(diagonal: Tensor) -> Tensor:
    """Columns by falling diag H [in_features] → int64 [in_features], ties in their old order."""
    return torch.argsort(diagonal, descending=True, stable=True)


def group_order(diagonal: Tensor, columns: int) -> Tensor:
    """Columns by falling diag H inside each group of `columns`, groups by their largest diagonal → int64 [in_features].

    Groups stay together, so a group's scale can still be found when its first column is reached, on the weights as
    compensated by then.
    """
    grouped = diagonal.reshape(-1, columns)
    inside = torch.argsort(grouped, dim=1, descending=True, stable=True)
    groups = torch.argsort(grouped.amax(dim=1), descending=True, stable=True)
    return (inside + columns * torch.arange(len(grouped), device=diagonal.device)[:, None])[groups].reshape(-1)


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`: x[:, order][:, inverse_order(order)] == x."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
