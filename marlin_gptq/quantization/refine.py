"""After the pass: better scales for given codes, better codes for given scales, under the layer's Hessian.

Both minimise tr((W−Q)·H·(W−Q)ᵀ) one coordinate at a time, each taken to its exact minimum, so neither ever raises it.
With R = (W−Q)·H, a step of the scale of group g with centred codes z is (z·R_g)/(z·H_gg·zᵀ), a step of one code is
R_k/(H_kk·s) rounded. Coordinate descent on codes for this loss: Behdin et al., "QuantEase" (arXiv 2309.01885).
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.quantization.grid import stored_scale
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group

_ZERO = 8


def refit_scales(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    """One sweep over the groups: each scale to its best value given all others, then rounded to its stored dtype.

    weight [out_features, in_features]; hessian [in_features, in_features]. A rounded scale that would raise the loss
    leaves the old one in place.
    """
    columns = columns_per_group(quantized.codes.shape[1], quantized.group_size)
    centred = quantized.codes.float() - _ZERO
    scales = quantized.scales.clone()
    residual = (weight.float() - quantized.dequantize()) @ hessian
    for group in range(scales.shape[1]):
        inside = slice(group * columns, (group + 1) * columns)
        codes = centred[:, inside]
        slope = (codes * residual[:, inside]).sum(1)
        curvature = ((codes @ hessian[inside, inside]) * codes).sum(1)
        old = scales[:, group].float()
        best = old + torch.where(curvature > 0, slope / curvature, torch.zeros_like(slope))
        new = stored_scale(best, scales.dtype).float()
        step = new - old
        # loss(step) − loss(0) = step²·curvature − 2·step·slope
        step = torch.where(step.square() * curvature - 2 * step * slope < 0, step, torch.zeros_like(step))
        scales[:, group] = (old + step).to(scales.dtype)
        residual -= (step[:, None] * codes) @ hessian[inside]
    return QuantizedWeight(quantized.codes, scales, quantized.zeros, quantized.group_size)


def descend_codes(
    weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, block_size: int = 128
) -> QuantizedWeight:
    """One sweep over the columns: each code to its best value 0 … 15 given all others.

    The residual is updated at once inside a block of columns and once a block outside it, as GPTQ does.
    """
    codes = quantized.codes.float() - _ZERO
    in_features = codes.shape[1]
    columns = columns_per_group(in_features, quantized.group_size)
    scales = quantized.scales.float()
    diagonal = hessian.diagonal()
    residual = (weight.float() - quantized.dequantize()) @ hessian
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        square = hessian[start:stop, start:stop]
        inside = residual[:, start:stop].t().contiguous()  # a column contiguous
        steps = torch.zeros_like(inside)
        reach = torch.where(diagonal[start:stop] > 0, 1 / diagonal[start:stop], 0)  # a dead feature stays as it is
        for column in range(start, stop):
            place = column - start
            scale = scales[:, column // columns]
            old = codes[:, column]
            new = torch.round(old + inside[place] * reach[place] / scale).clamp_(-_ZERO, 15 - _ZERO)
            step = (new - old) * scale
            codes[:, column] = new
            steps[place] = step
            inside.addr_(square[place], step, alpha=-1.0)
        residual.addmm_(steps.t(), hessian[start:stop], alpha=-1.0)
    return QuantizedWeight((codes + _ZERO).to(torch.uint8), quantized.scales, quantized.zeros, quantized.group_size)


def refine(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, *, sweeps: int) -> QuantizedWeight:
    """`sweeps` times scales, then codes. Ends with codes, which so are the best for the scales as stored."""
    for _ in range(sweeps):
        quantized = refit_scales(weight, quantized, hessian)
        quantized = descend_codes(weight, quantized, hessian)
    return quantized
