"""Gradients of the products with a 4-bit weight: by the activations and by the bias, never by the weight.

They are asked for in Python, by `kernel.gemm` and `kernel.gemm_blocked`. A formula registered with torch.library would
add a dispatch of some 4 µs to every call, also where no gradient is wanted, to an op that takes 4 µs as it is. So the
ops themselves have none, and refuse inputs that require one (`checks.refuse_gradients`); torch would give wrong ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marlin_gptq.kernel.blocked import from_blocks, stored_scales
from marlin_gptq.kernel.reference import unpack_codes, unpack_scales, unpack_zeros

PIECE = 2**24  # weights that are decoded at a time: 64 MB of codes
_STEP = 128  # features: whole tiles, and whole groups of any size


class Gemm(torch.autograd.Function):
    """torch.ops.marlin_gptq.gemm and its gradients."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        result: Tensor = torch.ops.marlin_gptq.gemm(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, qweight, scales, _, _, qzeros = inputs
        ctx.save_for_backward(qweight, scales, qzeros)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_a, _, _, by_bias, _, _ = ctx.needs_input_grad
        return (
            input_gradient(gradient, *ctx.saved_tensors) if by_a else None,
            None,
            None,
            gradient.sum(0) if by_bias else None,
            None,
            None,
        )


class GemmBlocked(torch.autograd.Function):
    """torch.ops.marlin_gptq.gemm_blocked and its gradients."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        result: Tensor = torch.ops.marlin_gptq.gemm_blocked(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, blocks, scales, _, n, group_size, asymmetric = inputs
        ctx.save_for_backward(blocks, scales)
        ctx.settings = n, a.shape[1], group_size, asymmetric

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_a, _, _, by_bias, _, _, _ = ctx.needs_input_grad
        found = None
        if by_a:
            blocks, natural = ctx.saved_tensors
            n, k, group_size, asymmetric = ctx.settings
            qweight, inside, qzeros = from_blocks(blocks, n, k, group_size, asymmetric, gradient.dtype)
            scales = inside if natural is None else stored_scales(natural)
            assert scales is not None
            found = input_gradient(gradient, qweight, scales, qzeros)
        return found, None, None, gradient.sum(0) if by_bias else None, None, None, None


def input_gradient(gradient: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> Tensor:
    """gradient [M, N] by the product's result · W [N, K] → [M, K], of the dtype of the gradient.

    qweight int32 [K/16, 2N], scales [groups, N], qzeros int32 [groups, N/8] or None, as in the Marlin layout.
    W is decoded in pieces and rounded to the dtype of the gradient, as in the forward product; off the GPU both are
    float32.
    """
    dtype = gradient.dtype if gradient.is_cuda else torch.float32
    steps, offsets = unpack_scales(scales).to(dtype), None if qzeros is None else unpack_zeros(qzeros)
    k, n = 16 * qweight.shape[0], scales.shape[1]
    size = k // steps.shape[0]
    by_result = gradient.to(dtype)
    width = max(PIECE // n // _STEP, 1) * _STEP
    parts = []
    for start in range(0, k, width):
        stop = min(start + width, k)
        group = torch.arange(start, stop, device=qweight.device) // size
        codes = unpack_codes(qweight[start // 16 : stop // 16]) - (8 if offsets is None else offsets[group])
        parts.append(by_result @ (codes.to(dtype) * steps[group]).t())
    return torch.cat(parts, dim=1).to(gradient.dtype)
