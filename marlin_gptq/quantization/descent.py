"""One group's scale and one block's codes taken to their best values, in plain torch.

Both work on a block of the gradient G = (W − Q)·H, which is all that they need to know of the columns outside it. Slow
and obvious; `fused.py` has the same functions as GPU kernels, `loops.py` decides between them, `refine.py` has the
formulas and what calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.quantization.grid import stored_scale


def refit_group(gradient: Tensor, codes: Tensor, scales: Tensor, found: Tensor, moves: Tensor, square: Tensor) -> None:
    """The best scale of one group per row, given all other scales.

    gradient  float32 [width, rows], the group's columns of G, a column contiguous.
    codes     uint8 [width, rows].
    scales    [rows] in the stored dtype; found, likewise, is written: the best scale rounded to that dtype, or the old
              one where the rounded one would raise the loss.
    moves     float32 [width, rows], written: what the weight's columns have changed by.
    square    float32 [width, width], the group's block of H.
    """
    centred = codes.float() - 8
    slope = (centred * gradient).sum(0)
    curvature = ((square @ centred) * centred).sum(0)
    old = scales.float()
    best = old + torch.where(curvature > 0, slope / curvature, torch.zeros_like(slope))
    new = stored_scale(best, scales.dtype).float()
    step = new - old
    lower = step.square() * curvature - 2 * step * slope < 0  # loss(step) − loss(0)
    found.copy_(torch.where(lower, new, old))
    torch.mul(torch.where(lower, step, torch.zeros_like(step)), centred, out=moves)


def descend_columns(
    gradient: Tensor,
    codes: Tensor,
    found: Tensor,
    moves: Tensor,
    square: Tensor,
    reach: Tensor,
    scales: Tensor,
    start: int,
    columns: int,
) -> None:
    """Each code of a block to its best value 0 … 15 given all others, column by column.

    gradient  float32 [width, rows], the block's columns of G, a column contiguous; used up.
    codes     uint8 [width, rows]; found, likewise, is written.
    moves     float32 [width, rows], written: what the weight's columns have changed by.
    square    float32 [width, width], the block of H; reach float32 [width], 1/H_kk, and 0 where a code is to stay.
    scales    [groups, rows] of all groups, of `columns` columns each; the block's first column is column `start`.
    """
    for place in range(len(codes)):
        scale = scales[(start + place) // columns].float()
        old = codes[place].float() - 8
        new = torch.round(old + gradient[place] * reach[place] / scale).clamp_(-8, 7)
        found[place] = new + 8
        moves[place] = (new - old) * scale
        gradient.addr_(square[place], moves[place], alpha=-1.0)
