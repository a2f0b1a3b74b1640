"""GPTQ: quantize column by column, each error pushed onto the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323, Algorithm 1), with the original Marlin repository's search of each group's clipping ratio under
the conditional Hessian. Rows are independent of one another, so the weights of several linears that share their
input may be stacked and quantized in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.quantization.grid import clipped_scale, full_scale, inverse_of_upper, signed_scale, stored_scale
from marlin_gptq.quantization.loops import Loops, inner_loops
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group, round_to_codes


def gptq_quantize(
    weight: Tensor,
    upper: Tensor,
    *,
    group_size: int,
    scale_dtype: torch.dtype,
    block_size: int = 128,
    clip: bool = True,
    signed: bool = False,
    hessian: Tensor | None = None,
    scales_of_columns: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize weight [out_features, in_features] (any float dtype) under `upper`, the factor U of `hessian.factor`.

    A group's scale is found when its first column is reached, from the weights as compensated so far, rounded to
    `scale_dtype`, and only then are codes chosen. Raises ValueError if the groups do not fill the row.

    The inner loops are those of `loops.inner_loops`: on a GPU fused kernels, elsewhere plain torch. The two differ by
    the rounding of float32 sums (`fused.py`), and so, near a tie, in a code or a scale.

    signed   let scales be negative (`grid.signed_scale`).
    hessian  the damped H, [in_features, in_features]: clipping is then judged under its plain blocks instead of the
             conditional ones, that is, as if no later column could make up for an error.
    scales_of_columns  [out_features, in_features] in `scale_dtype`: steps fixed beforehand; none is searched, and the
             scales of the result are those of each group's first column.
    """
    out_features, in_features = weight.shape
    columns = lined_up_groups(in_features, group_size, block_size)
    remaining = weight.float().clone()
    codes = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, in_features // columns, dtype=scale_dtype, device=weight.device)
    if scales_of_columns is not None:
        scales.copy_(scales_of_columns[:, ::columns])

    loops = inner_loops(weight.device, columns, min(block_size, in_features), scale_dtype)
    whiteners = whiteners_of_groups(upper, hessian, columns) if clip and scales_of_columns is None else None

    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        # Columns as rows: a column of the block is then contiguous, which the inner loops live on.
        block = remaining[:, start:stop].t().contiguous()
        block_codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
        square = upper[start:stop, start:stop].contiguous()
        # Columns in a row that share a scale; steps given beforehand are each column's own.
        run = min(columns, stop - start) if scales_of_columns is None else stop - start
        for first in range(start, stop, run):
            group, inside = divmod(first, columns)
            if inside == 0 and scales_of_columns is None:
                end = first + columns
                # A group longer than the block reaches into columns that all earlier blocks have compensated.
                ahead = remaining[:, first:end] if end > stop else block[first - start : end - start].t()
                whitener = None if whiteners is None else whiteners[group]
                scales[:, group] = scale_of_group(ahead, whitener, scale_dtype, signed, loops)
            steps = scales[:, group] if scales_of_columns is None else scales_of_columns[:, start:stop].t()
            loops.quantize_columns(block, block_codes, errors, square, steps, first - start, first - start + run)
        codes[:, start:stop] = block_codes.t()
        loops.push_errors(remaining[:, stop:], errors, upper[start:stop, stop:])
    return QuantizedWeight(codes, scales, None, group_size)


def lined_up_groups(in_features: int, group_size: int, block_size: int) -> int:
    """Columns of a group; ValueError if groups do not fill the row, or neither divides the other of group and block."""
    columns = columns_per_group(in_features, group_size)
    if columns % block_size and block_size % columns and columns != in_features:
        raise ValueError(f"block_size: got {block_size}, which does not line up with groups of {columns}")
    return columns


def scale_of_group(weight: Tensor, whitener: Tensor | None, dtype: torch.dtype, signed: bool, loops: Loops) -> Tensor:
    """The scales [rows] of one group, of weight [rows, columns] as compensated so far; no whitener is no clipping."""
    if whitener is not None:
        found = clipped_scale(weight, whitener, dtype, signed=signed, whitener=whitener, search=loops.best_scales)
    elif signed:
        found = stored_scale(signed_scale(weight), dtype)
    else:
        found = full_scale(weight, dtype)
    return found.squeeze(1)


def whiteners_of_groups(upper: Tensor, hessian: Tensor | None, columns: int) -> Tensor:
    """What each group's errors are judged with, float32 [groups, columns, columns]: V of `grid.clipped_scale`.

    All at once: one by one they would take longer than the search.
    """
    groups = len(upper) // columns
    corners = (upper if hessian is None else hessian).unflatten(0, (groups, columns)).unflatten(2, (groups, columns))
    corners = corners.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    return inverse_of_upper(corners.float()) if hessian is None else torch.linalg.cholesky(corners)


def rtn_quantize(weight: Tensor, *, group_size: int, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Round to nearest on the full grid of each group, no calibration: the baseline, only when asked for."""
    out_features, in_features = weight.shape
    columns = columns_per_group(in_features, group_size)
    groups = weight.float().reshape(-1, columns)
    scales = full_scale(groups, scale_dtype)
    codes = round_to_codes(groups, scales).reshape(out_features, in_features)
    return QuantizedWeight(codes, scales.reshape(out_features, -1), None, group_size)
