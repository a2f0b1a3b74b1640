"""One layer, from its Hessian to codes and scales: the techniques of this folder in the order a config asks for.

target   W* for the inputs that really arrive         (correct_target)
factor   U of the damped Hessian, columns in order    (damp_percent, act_order)
gptq     scales and codes                             (clip, clip_hessian, signed_scales)
refine   scales and codes again                       (refine_sweeps)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.quantization.gptq import gptq_quantize
from marlin_gptq.quantization.grid import clipped_scale
from marlin_gptq.quantization.hessian import Factor, damp, factor
from marlin_gptq.quantization.order import column_order, group_order, inverse_order
from marlin_gptq.quantization.refine import refine
from marlin_gptq.quantization.target import corrected_target
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group


@dataclass(frozen=True)
class Solution:
    """A quantized weight and the damping its Hessian took."""

    quantized: QuantizedWeight
    damp_percent: float


def solve(
    weight: Tensor,
    hessian: Tensor,
    config: QuantizationConfig,
    scale_dtype: torch.dtype,
    *,
    cross: Tensor | None = None,
    costs: Costs | None = None,
) -> Solution:
    """Quantize weight [out_features, in_features] under H [in_features, in_features] as `config` says.

    cross  C of `corrected_target`; needed if config.correct_target is above 0.
    Raises NotPositiveDefinite and ValueError as `hessian.factor` does.
    """
    costs = costs or Costs(weight.device)
    with costs.measure("factor"):
        found = factor(hessian, config.damp_percent)
        damped = damp(hessian, found.damp_percent)
    weight = weight.float()
    if config.correct_target and cross is not None:
        with costs.measure("correct target"):
            weight = corrected_target(weight, cross, damped, config.correct_target)
    if config.act_order == "columns":
        quantized = _columns_in_order(weight, hessian, damped, found, config, scale_dtype, costs)
    elif config.act_order == "groups":
        columns = columns_per_group(weight.shape[1], config.group_size)
        order = group_order(hessian.diagonal(), columns)
        with costs.measure("factor"):
            turned = hessian[order][:, order]
            upper = factor(turned, found.damp_percent).upper
        with costs.measure("gptq"):
            turned_result = _gptq(weight[:, order], upper, damped[order][:, order], config, scale_dtype)
        back = inverse_order(order[::columns] // columns)
        codes = turned_result.codes[:, inverse_order(order)]
        quantized = QuantizedWeight(codes, turned_result.scales[:, back], None, config.group_size)
    else:
        with costs.measure("gptq"):
            quantized = _gptq(weight, found.upper, damped, config, scale_dtype)
    if config.refine_sweeps:
        with costs.measure("refine"):
            quantized = refine(weight, quantized, damped, sweeps=config.refine_sweeps)
    return Solution(quantized, found.damp_percent)


def _gptq(
    weight: Tensor, upper: Tensor, damped: Tensor, config: QuantizationConfig, scale_dtype: torch.dtype
) -> QuantizedWeight:
    return gptq_quantize(
        weight,
        upper,
        group_size=config.group_size,
        scale_dtype=scale_dtype,
        block_size=config.block_size,
        clip=config.clip,
        signed=config.signed_scales,
        hessian=damped if config.clip_hessian == "plain" else None,
    )


def _columns_in_order(
    weight: Tensor,
    hessian: Tensor,
    damped: Tensor,
    found: Factor,
    config: QuantizationConfig,
    scale_dtype: torch.dtype,
    costs: Costs,
) -> QuantizedWeight:
    """All scales first, from the weights as they are; then single columns by falling diagonal."""
    columns = columns_per_group(weight.shape[1], config.group_size)
    with costs.measure("scales"):
        scales = static_scales(weight, found.upper, damped, columns, config, scale_dtype)
    order = column_order(hessian.diagonal())
    with costs.measure("factor"):
        upper = factor(hessian[order][:, order], found.damp_percent).upper
    with costs.measure("gptq"):
        quantized = gptq_quantize(
            weight[:, order],
            upper,
            group_size=config.group_size,
            scale_dtype=scale_dtype,
            block_size=config.block_size,
            scales_of_columns=scales.repeat_interleave(columns, dim=1)[:, order],
        )
    return QuantizedWeight(quantized.codes[:, inverse_order(order)], scales, None, config.group_size)


def static_scales(
    weight: Tensor, upper: Tensor, damped: Tensor, columns: int, config: QuantizationConfig, dtype: torch.dtype
) -> Tensor:
    """The scales of all groups of `columns` of an uncompensated weight → [out_features, groups].

    Each group is judged under its own block of H ("plain"), or under H given that all other columns are free to make
    up for its error ("conditional"): the inverse of its block of H⁻¹ = Uᵀ·U.
    """
    found = []
    for start in range(0, weight.shape[1], columns):
        inside = slice(start, start + columns)
        block = damped[inside, inside]
        if config.clip_hessian == "conditional":
            above = upper[: inside.stop, inside]
            block = torch.linalg.inv(above.t() @ above)
            block = (block + block.t()) / 2
        whitener = torch.linalg.cholesky(block)
        found.append(clipped_scale(weight[:, inside], block, dtype, signed=config.signed_scales, whitener=whitener))
    return torch.cat(found, dim=1)
