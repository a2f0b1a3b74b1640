"""After the pass: better scales for given codes, better codes for given scales, under the layer's Hessian.

Both minimise tr((W−Q)·H·(W−Q)ᵀ) one coordinate at a time, each taken to its exact minimum, so neither ever raises it.
With the gradient G = (W−Q)·H, a step of the scale of group g with centred codes z is (z·G_g)/(z·H_gg·zᵀ), a step of
one code is G_k/(H_kk·s) rounded. Coordinate descent on codes for this loss: Behdin et al., "QuantEase" (arXiv
2309.01885). A group or block is worked on with its own columns of G up to date (`descent.py`); what it has changed is
taken from the columns behind it at once, as GPTQ pushes its errors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marlin_gptq.quantization.loops import Loops, inner_loops
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group


def refit_scales(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, block_size: int = 128) -> QuantizedWeight:
    """One sweep over the groups: each scale to its best value given all others, then rounded to its stored dtype.

    weight [out_features, in_features]; hessian float32 [in_features, in_features]. A rounded scale that would raise the
    loss leaves the old one in place. block_size, that of `descend_codes`, decides nothing but which loops run.
    """
    in_features = weight.shape[1]
    columns = columns_per_group(in_features, quantized.group_size)
    loops = _loops(quantized, block_size)
    gradient = _gradient(weight, quantized, hessian, loops)
    codes, scales = quantized.codes.t().contiguous(), quantized.scales.t().contiguous()
    found = torch.empty_like(scales)
    for group in range(len(scales)):
        start, stop = group * columns, (group + 1) * columns
        block = gradient[:, start:stop].t().contiguous()
        moves = torch.empty_like(block)
        square = hessian[start:stop, start:stop]
        loops.refit_group(block, codes[start:stop], scales[group], found[group], moves, square)
        loops.push_errors(gradient[:, stop:], moves, hessian[start:stop, stop:])
    return QuantizedWeight(quantized.codes, found.t().contiguous(), quantized.zeros, quantized.group_size)


def descend_codes(
    weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, block_size: int = 128
) -> QuantizedWeight:
    """One sweep over the columns: each code to its best value 0 … 15 given all others. Arguments as of `refit_scales`.

    The gradient is updated at once inside a block of columns and once a block behind it, as GPTQ does.
    """
    in_features = weight.shape[1]
    columns = columns_per_group(in_features, quantized.group_size)
    loops = _loops(quantized, block_size)
    gradient = _gradient(weight, quantized, hessian, loops)
    codes, scales = quantized.codes.t().contiguous(), quantized.scales.t().contiguous()
    found = torch.empty_like(codes)
    diagonal = hessian.diagonal()
    reach = torch.where(diagonal > 0, 1 / diagonal, 0)  # a dead feature stays as it is
    for start in range(0, in_features, block_size):
        stop = min(start + block_size, in_features)
        inside = slice(start, stop)
        block = gradient[:, inside].t().contiguous()
        moves = torch.empty_like(block)
        square = hessian[inside, inside]
        loops.descend_columns(block, codes[inside], found[inside], moves, square, reach[inside], scales, start, columns)
        loops.push_errors(gradient[:, stop:], moves, hessian[inside, stop:])
    return QuantizedWeight(found.t().contiguous(), quantized.scales, quantized.zeros, quantized.group_size)


def refine(
    weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, *, sweeps: int, block_size: int = 128
) -> QuantizedWeight:
    """`sweeps` times scales, then codes. Ends with codes, which so are the best for the scales as stored.

    The inner loops are those of `loops.inner_loops` for `block_size`, as in GPTQ.
    """
    for _ in range(sweeps):
        quantized = refit_scales(weight, quantized, hessian, block_size)
        quantized = descend_codes(weight, quantized, hessian, block_size)
    return quantized


def product_of(quantized: QuantizedWeight, block_size: int = 128) -> Callable[[Tensor, Tensor], Tensor]:
    """(left, right) → leftᵀ·right, float32, by the loops that refine this weight."""
    loops = _loops(quantized, block_size)

    def product(left: Tensor, right: Tensor) -> Tensor:
        total = torch.zeros(left.shape[1], right.shape[1], device=left.device)
        loops.push_errors(total, left.contiguous(), right)
        return total.neg_()

    return product


def _loops(quantized: QuantizedWeight, block_size: int) -> Loops:
    in_features = quantized.codes.shape[1]
    columns = columns_per_group(in_features, quantized.group_size)
    return inner_loops(quantized.codes.device, columns, min(block_size, in_features), quantized.scales.dtype)


def _gradient(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, loops: Loops) -> Tensor:
    """(W − Q)·H, float32 [out_features, in_features].

    Made by the loops' own product, whose bits in a row do not depend on the other rows where it is fused.
    """
    errors = quantized.dequantize().sub_(weight.float()).t().contiguous()
    gradient = torch.zeros_like(quantized.codes, dtype=torch.float32)
    loops.push_errors(gradient, errors, hessian)
    return gradient
