"""KL divergence of next-token distributions as a loss, computed so that no table of all logits is ever held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marlin_gptq.quantization.tuning_loops import tuning_loops

# Elements of one table of logits, float32: 256 MiB each, two at a time, or five without fused kernels.
_LOGITS_AT_ONCE = 1 << 26


def divergence(hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean over tokens of KL(softmax(teacher·Wᵀ + b) ‖ softmax(hidden·Wᵀ + b)) in nats; gradients go to `hidden` only.

    hidden   [tokens, hidden_size] float32, what the student's output head sees.
    teacher  [tokens, hidden_size] any float dtype, what the full-precision model's head sees.
    weight   [vocab_size, hidden_size] float32, the head of both; bias [vocab_size] or None.
    """
    return _Divergence.apply(hidden, teacher, weight, bias)


class _Divergence(torch.autograd.Function):
    """The gradient by the student's logits is q − p: it is made with the loss, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tokens = hidden.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        loops = tuning_loops(hidden.device)
        step = max(1, _LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            p = torch.nn.functional.linear(teacher[rows].to(weight.dtype), weight, bias)
            losses, difference = loops.differences(p, torch.nn.functional.linear(hidden[rows], weight, bias))
            total += losses.sum()
            gradient[rows] = difference @ weight
        ctx.save_for_backward(gradient)
        ctx.tokens = tokens
        return total / tokens

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer / ctx.tokens), None, None, None
