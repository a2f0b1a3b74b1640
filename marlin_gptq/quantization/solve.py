"""One layer, from its Hessian to codes and scales: the techniques of this folder in the order a config asks for.

prepare  what all rows share: U of the damped Hessian, columns in order   (damp_percent, act_order)
solve    target W* for the inputs that really arrive                      (correct_target)
         scales and codes by GPTQ                                         (clip, clip_hessian, signed_scales)
         or by a K-best search in its place                               (beam_width)
         scales and codes again                                           (refine_sweeps)
         and once more, each row for the errors of the others             (two_sided)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.quantization.gptq import gptq_quantize
from marlin_gptq.quantization.grid import clipped_scale
from marlin_gptq.quantization.hessian import damp, factor
from marlin_gptq.quantization.kbest import kbest_quantize
from marlin_gptq.quantization.loops import inner_loops
from marlin_gptq.quantization.order import column_order, group_order, inverse_order
from marlin_gptq.quantization.refine import product_of, refine
from marlin_gptq.quantization.target import corrected_target
from marlin_gptq.quantization.two_sided import refine_both_sides
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group, join_rows


@dataclass(frozen=True)
class Prepared:
    """What the rows of one weight share under their Hessian.

    group_size    its groups; damp_percent is what the factorisation took.
    order, upper  the columns in the order GPTQ takes them (None: as they are), and U of H in that order.
    damped        H + λI with columns as they are; None where no technique needs it.
    judged        H + λI in `order`, for clip_hessian "plain"; else None.
    inside        for act-order "columns", U with columns as they are, under which scales are searched; else None.
    """

    group_size: int
    damp_percent: float
    order: Tensor | None
    upper: Tensor
    damped: Tensor | None
    judged: Tensor | None
    inside: Tensor | None


def prepare(hessian: Tensor, config: QuantizationConfig, group_size: int, costs: Costs | None = None) -> Prepared:
    """Order and factor H [in_features, in_features], for weights in groups of `group_size`.

    Raises NotPositiveDefinite and ValueError as `hessian.factor` does.
    """
    with (costs or Costs(hessian.device)).measure("factor"):
        inside, order, damp_percent = None, None, config.damp_percent
        if config.act_order == "columns":
            found = factor(hessian, damp_percent)
            inside, damp_percent = found.upper, found.damp_percent
            order = column_order(hessian.diagonal())
        elif config.act_order == "groups":
            order = group_order(hessian.diagonal(), columns_per_group(len(hessian), group_size))
        found = factor(hessian if order is None else hessian[order][:, order], damp_percent)
        plain = config.clip_hessian == "plain"
        wanted = plain or inside is not None or bool(config.refine_sweeps or config.correct_target or config.two_sided)
        damped = damp(hessian, found.damp_percent) if wanted else None
        judged = None
        if plain and damped is not None:
            judged = damped if order is None else damped[order][:, order]
        return Prepared(group_size, found.damp_percent, order, found.upper, damped, judged, inside)


def solve(
    weight: Tensor,
    prepared: Prepared,
    config: QuantizationConfig,
    scale_dtype: torch.dtype,
    *,
    cross: Tensor | None = None,
    outputs: Sequence[Tensor] = (),
    rows: int | None = None,
    costs: Costs | None = None,
) -> QuantizedWeight:
    """Quantize weight [out_features, in_features] as `config` says, under what `prepare` made of its Hessian.

    cross    C of `corrected_target`; needed if config.correct_target is above 0.
    outputs  M of `two_sided`, of each of the linears that are stacked in the weight; needed if config.two_sided.
    rows     so many are solved at once; None is all. Rows are independent, so this changes the memory it takes alone.
    """
    costs = costs or Costs(weight.device)
    damped = prepared.damped
    if not (config.two_sided and outputs and damped is not None):
        pieces = weight.split(rows or len(weight))
        return join_rows([_solve(piece, prepared, config, scale_dtype, cross, costs) for piece in pieces])
    weight = _corrected(weight.float(), cross, damped, config, costs)
    alone = replace(config, two_sided=False, correct_target=0.0)

    quantized = solve(weight, prepared, alone, scale_dtype, rows=rows, costs=costs)

    def again(target: Tensor, found: QuantizedWeight) -> QuantizedWeight:
        step, parts = rows or len(target), []
        for first in range(0, len(target), step):
            part = found.rows(first, min(first + step, len(target)))
            parts.append(refine(target[first : first + step], part, damped, sweeps=1, block_size=config.block_size))
        return join_rows(parts)

    with costs.measure("two-sided"):
        return refine_both_sides(weight, quantized, damped, outputs, again, product_of(quantized, config.block_size))


def _solve(
    weight: Tensor,
    prepared: Prepared,
    config: QuantizationConfig,
    scale_dtype: torch.dtype,
    cross: Tensor | None,
    costs: Costs,
) -> QuantizedWeight:
    weight, damped = weight.float(), prepared.damped
    if damped is not None:
        weight = _corrected(weight, cross, damped, config, costs)
    scales = None
    if prepared.inside is not None and damped is not None:
        # All scales first, from the weights as they are; then single columns by falling diagonal.
        with costs.measure("scales"):
            scales = static_scales(weight, prepared.inside, damped, prepared.group_size, config, scale_dtype)
    with costs.measure("gptq" if config.beam_width == 1 else "k-best search"):
        quantized = _gptq(weight, prepared, config, scale_dtype, scales)
    if config.refine_sweeps and damped is not None:
        with costs.measure("refine"):
            quantized = refine(weight, quantized, damped, sweeps=config.refine_sweeps, block_size=config.block_size)
    return quantized


def _corrected(
    weight: Tensor, cross: Tensor | None, damped: Tensor, config: QuantizationConfig, costs: Costs
) -> Tensor:
    if cross is None or not config.correct_target:
        return weight
    with costs.measure("correct target"):
        return corrected_target(weight, cross, damped, config.correct_target)


def _gptq(
    weight: Tensor, prepared: Prepared, config: QuantizationConfig, scale_dtype: torch.dtype, scales: Tensor | None
) -> QuantizedWeight:
    """GPTQ, greedy or with several beginnings of a row, with the columns in order; codes and scales back in place."""
    order, group_size = prepared.order, prepared.group_size
    columns = columns_per_group(weight.shape[1], group_size)
    search = gptq_quantize if config.beam_width == 1 else partial(kbest_quantize, width=config.beam_width)
    quantized = search(
        weight if order is None else weight[:, order],
        prepared.upper,
        group_size=group_size,
        scale_dtype=scale_dtype,
        block_size=config.block_size,
        clip=config.clip,
        signed=config.signed_scales,
        hessian=prepared.judged,
        scales_of_columns=None if scales is None else scales.repeat_interleave(columns, dim=1)[:, order],
    )
    if order is None:
        return quantized
    codes = quantized.codes[:, inverse_order(order)]
    if scales is None:
        scales = quantized.scales[:, inverse_order(order[::columns] // columns)]
    return QuantizedWeight(codes, scales, None, group_size)


def static_scales(
    weight: Tensor, upper: Tensor, damped: Tensor, group_size: int, config: QuantizationConfig, dtype: torch.dtype
) -> Tensor:
    """The scales of all groups of an uncompensated weight → [out_features, groups].

    Each group is judged under its own block of H ("plain"), or under H given that all other columns are free to make
    up for its error ("conditional"): the inverse of its block of H⁻¹ = Uᵀ·U.
    """
    found = []
    columns = columns_per_group(weight.shape[1], group_size)
    search = inner_loops(weight.device, columns, min(config.block_size, weight.shape[1]), dtype).best_scales
    for start in range(0, weight.shape[1], columns):
        inside = slice(start, start + columns)
        block = damped[inside, inside]
        if config.clip_hessian == "conditional":
            above = upper[: inside.stop, inside]
            block = torch.linalg.inv(above.t() @ above)
            block = (block + block.t()) / 2
        whitener = torch.linalg.cholesky(block)
        found.append(
            clipped_scale(
                weight[:, inside], block, dtype, signed=config.signed_scales, whitener=whitener, search=search
            )
        )
    return torch.cat(found, dim=1)
