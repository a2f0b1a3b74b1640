"""A quantized weight that gradients can move, and that is exactly a quantized weight at every moment.

Its parameters are a relative shift for every scale and, if codes may move, a position in code units for every
weight, whose nearest integer is the code. Both are rounded in the forward pass just as they will be stored; the
gradient passes the rounding as if it were not there (the straight-through estimator: Bengio et al., arXiv 1308.3432;
for step sizes Esser et al., "Learned Step Size Quantization", arXiv 1902.08153; for rounding offsets after calibration
Cheng et al., AutoRound, arXiv 2309.05516; for scales of fixed codes Chen et al., EfficientQAT, arXiv 2407.11062).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.quantization.grid import stored_scale
from marlin_gptq.quantization.tuning_loops import tuning_loops
from marlin_gptq.quantization.tuning_steps import HIGHEST, LOWEST, grouped, nearest, scaled
from marlin_gptq.quantization.weight import QuantizedWeight

# Where a weight starts between two codes: just inside the interval that rounds to its code.
_EDGE = 0.49


class TunableWeight(nn.Module):
    """The weight [out_features, in_features] of `quantized`, as a function of `shift` and `position`.

    shift     float32 [out_features, groups]: the scale is scale₀·(1 + shift), rounded to the stored dtype.
    position  float32 [out_features, in_features] around 0 (code 8), or None with fixed codes.
    original  the weight before quantization. A position starts where it would lie on the grid, or at the edge of its
              code's interval if that lies elsewhere: weights that were rounded by a hair cross first.
    """

    def __init__(self, quantized: QuantizedWeight, original: Tensor | None = None) -> None:
        super().__init__()
        self.group_size = quantized.group_size
        self.in_features = quantized.codes.shape[1]
        self.dtype = quantized.scales.dtype
        self.start: Tensor
        self.codes: Tensor | None
        self.register_buffer("start", quantized.scales.float())
        self.shift = nn.Parameter(torch.zeros_like(self.start))
        centred = quantized.codes.to(torch.int8) - 8
        if original is None:
            self.register_buffer("codes", centred)
            self.position = None
        else:
            self.codes = None
            columns = centred.shape[1] // self.start.shape[1]
            offset = original.float() / self.start.repeat_interleave(columns, dim=1) - centred
            self.position = nn.Parameter(centred + offset.clamp_(-_EDGE, _EDGE))

    def forward(self) -> Tensor:
        """The weight as it would be read back from disk, float32 [out_features, in_features].

        Inside torch.autocast rounded to its dtype at once, as every product there would round it.
        """
        kind = self.start.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if self.position is not None:
            return _MovingCodes.apply(self.position, self.shift, self.start, self.dtype, dtype)
        assert self.codes is not None
        return _FixedCodes.apply(self.codes, _stored(self.start * (1 + self.shift), self.dtype), dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """Codes and stored scales as they stand: its `dequantize` is bit for bit what `forward` gives."""
        codes = self.codes if self.position is None else nearest(self.position)
        assert codes is not None
        scales = stored_scale(self.start * (1 + self.shift), self.dtype)
        return QuantizedWeight((codes.to(torch.int16) + 8).to(torch.uint8), scales, None, self.group_size)


@torch.no_grad()
def clamp_(weights: Iterable[TunableWeight]) -> None:
    """Bring positions back into the range of codes; after every step."""
    positions: list[Tensor] = [weight.position for weight in weights if weight.position is not None]
    if positions:  # as few launches for all of them as torch can make
        torch._foreach_clamp_min_(positions, LOWEST - _EDGE)
        torch._foreach_clamp_max_(positions, HIGHEST + _EDGE)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return scales + (stored_scale(scales.detach(), dtype).float() - scales).detach()


class _MovingCodes(torch.autograd.Function):
    """scale · round(position), see `tuning_steps.py`; keeps its inputs and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, position: Tensor, shift: Tensor, start: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(position, shift, start)
        ctx.scale_dtype = scale_dtype
        return tuning_loops(position.device).moved_weight(position, shift, start, scale_dtype, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        position, shift, start = ctx.saved_tensors
        loops = tuning_loops(position.device)
        return *loops.moved_gradients(gradient, position, shift, start, ctx.scale_dtype), None, None, None


class _FixedCodes(torch.autograd.Function):
    """scale · code for int8 codes."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return scaled(codes, scales, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        codes, scales = ctx.saved_tensors
        return None, (grouped(gradient, scales) * grouped(codes, scales).to(scales.dtype)).sum(-1), None
