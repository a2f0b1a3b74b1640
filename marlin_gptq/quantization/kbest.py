"""K-best search: GPTQ that keeps the `width` best beginnings of every row instead of one.

With e_c = (w_c − q_c) / U_cc, w_c being compensated for all columns before, a row's loss (w−q)·H·(w−q)ᵀ is Σ e_c²: each
column adds its part and later columns never lower it. GPTQ takes the nearest code of every column, which is Babai's
nearest plane on the lattice of the rows of U⁻¹ (Babai, "On Lovász' lattice reduction and the nearest lattice point
problem", 1986; Chen et al., "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm", arXiv
2507.18553). Here the nearest codes of every kept beginning are tried, and those with the least sum so far go on: the
K-best sphere decoder (Guo and Nilsson, "Algorithm and Implementation of the K-Best Sphere Decoding for MIMO Detection",
2006), breadth first, so that all rows go in step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marlin_gptq.quantization.gptq import lined_up_groups, scale_of_group, whiteners_of_groups
from marlin_gptq.quantization.loops import inner_loops
from marlin_gptq.quantization.weight import QuantizedWeight

# Codes that a kept beginning tries for its next column. A third one lies a step from the weight or more; it changed the
# loss of random layers by 0.25 % at most, mostly by less than 0.1 %.
PROPOSALS = 2


class Children(NamedTuple):
    """One column's best continuations, [width, rows] each, by rising loss.

    codes   uint8; errors, losses float32, of the column and summed up to it.
    parent  int64, which of the beginnings before it each continues.
    """

    codes: Tensor
    errors: Tensor
    losses: Tensor
    parent: Tensor


def best_children(
    column: Tensor, losses: Tensor, steps: Tensor, diagonal: Tensor, proposals: int = PROPOSALS
) -> Children:
    """The `width` continuations of least loss, of each row's beginnings and the `proposals` nearest codes of each.

    column, losses  float32 [width, rows]: the next column as every beginning has compensated it, and the sum so far.
    steps           float32 [rows], the column's scales; diagonal is U_cc. Of equal losses the first goes first.
    """
    width, rows = column.shape
    window = torch.arange(proposals, device=column.device)[:, None]
    # The nearest codes lie side by side, so the range −8 … 7 only shifts their window.
    lowest = torch.round(column / steps - (proposals - 1) / 2).clamp_(-8, 8 - proposals)
    tried = lowest[:, None] + window  # [width, proposals, rows]
    errors = (column[:, None] - tried * steps) / diagonal
    ordered, place = (losses[:, None] + errors.square()).view(-1, rows).sort(dim=0, stable=True)
    place = place[:width]
    codes = (tried.view(-1, rows).gather(0, place) + 8).to(torch.uint8)
    return Children(codes, errors.view(-1, rows).gather(0, place), ordered[:width], place // proposals)


def kbest_quantize(
    weight: Tensor,
    upper: Tensor,
    *,
    width: int,
    group_size: int,
    scale_dtype: torch.dtype,
    block_size: int = 128,
    clip: bool = True,
    signed: bool = False,
    hessian: Tensor | None = None,
    scales_of_columns: Tensor | None = None,
    proposals: int = PROPOSALS,
) -> QuantizedWeight:
    """Quantize weight [out_features, in_features] with `width` beginnings kept of every row; with 1 it is GPTQ.

    All other arguments, and what is raised, as of `gptq.gptq_quantize`. A group's scale, one for all beginnings of a
    row, is found for the best of them when the group's first column is reached.
    proposals  codes that each beginning tries for a column. With 16, and as many beginnings as there are rows of codes,
               every row is tried and the best found.

    It takes 2·width float32 copies of the weight. It runs in plain torch, on a GPU too, but for the search of scales
    and the update behind a block, which are those of `loops.inner_loops`.
    """
    rows, in_features = weight.shape
    columns = lined_up_groups(in_features, group_size, block_size)
    if width == 1:
        proposals = 1  # the nearest code, whatever a sum's rounding makes of a tie
    # Beginning k of row r is row k·rows + r, so that all beginnings are just more rows for what GPTQ does.
    remaining = weight.float().repeat(width, 1)
    losses = torch.full((width, rows), torch.inf, device=weight.device)
    losses[0] = 0  # all begin alike: only the first counts
    scales = torch.empty(rows, in_features // columns, dtype=scale_dtype, device=weight.device)
    if scales_of_columns is not None:
        scales.copy_(scales_of_columns[:, ::columns])
    loops = inner_loops(weight.device, columns, min(block_size, in_features), scale_dtype)
    whiteners = whiteners_of_groups(upper, hessian, columns) if clip and scales_of_columns is None else None

    row_numbers = torch.arange(rows, device=weight.device)
    kept: list[tuple[Tensor, Tensor]] = []
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        ahead = remaining[:, start:stop].t().contiguous()  # the block's columns still to come
        path: list[tuple[Tensor, Tensor, Tensor]] = []
        for column in range(start, stop):
            group, inside = divmod(column, columns)
            if inside == 0 and scales_of_columns is None:
                end = column + columns
                best = remaining[:rows, column:end] if end > stop else ahead[:columns, :rows].t()
                whitener = None if whiteners is None else whiteners[group]
                scales[:, group] = scale_of_group(best, whitener, scale_dtype, signed, loops)
            steps = scales[:, group] if scales_of_columns is None else scales_of_columns[:, column]
            own = ahead[0].view(width, rows)
            found = best_children(own, losses, steps.float(), upper[column, column], proposals)
            losses = found.losses
            source = (found.parent * rows + row_numbers).view(-1)
            errors = found.errors.view(-1)
            path.append((found.codes.view(-1), errors, source))
            ahead = ahead[1:].index_select(1, source)
            ahead.addr_(upper[column, column + 1 : stop], errors, alpha=-1.0)
        codes, block_errors, origin = _traced(path)
        kept.append((codes, origin))
        remaining[:, stop:] = remaining[:, stop:].index_select(0, origin)
        loops.push_errors(remaining[:, stop:], block_errors, upper[start:stop, stop:])

    chosen = row_numbers  # the best beginning, at the end, is the best row
    found_codes = []
    for codes, origin in reversed(kept):
        found_codes.append(codes[:, chosen])
        chosen = origin[chosen]
    return QuantizedWeight(torch.cat(found_codes[::-1]).t().contiguous(), scales, None, group_size)


def _traced(path: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, errors, origin) of the beginnings at the end of a block, [columns, width·rows] and [width·rows].

    path  (codes, errors, source) of each column in the order of the beginnings then, source being the place that each
          had one column before. origin is the place it had before the block.
    """
    place = torch.arange(len(path[0][0]), device=path[0][0].device)
    codes, errors = [], []
    for own_codes, own_errors, source in reversed(path):
        codes.append(own_codes[place])
        errors.append(own_errors[place])
        place = source[place]
    return torch.stack(codes[::-1]), torch.stack(errors[::-1]), place
