"""A quantized weight that gradients can move, and that is exactly a quantized weight at every moment.

Its parameters are a relative shift for every scale and, if codes may move, a position in code units for every
weight, whose nearest integer is the code. Both are rounded in the forward pass just as they will be stored; the
gradient passes the rounding as if it were not there (the straight-through estimator: Bengio et al., arXiv 1308.3432;
for step sizes Esser et al., "Learned Step Size Quantization", arXiv 1902.08153; for rounding offsets after calibration
Cheng et al., AutoRound, arXiv 2309.05516; for scales of fixed codes Chen et al., EfficientQAT, arXiv 2407.11062).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.quantization.grid import stored_scale
from marlin_gptq.quantization.weight import QuantizedWeight

_LOWEST, _HIGHEST = -8.0, 7.0
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
        scales = _stored(self.start * (1 + self.shift), self.dtype)
        if self.position is None:
            assert self.codes is not None
            return _FixedCodes.apply(self.codes, scales)
        return _MovingCodes.apply(self.position, scales)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring positions back into the range of codes; after every step."""
        if self.position is not None:
            self.position.clamp_(_LOWEST - _EDGE, _HIGHEST + _EDGE)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """Codes and stored scales as they stand: its `dequantize` is bit for bit what `forward` gives."""
        codes = self.codes if self.position is None else _nearest(self.position)
        assert codes is not None
        scales = stored_scale(self.start * (1 + self.shift), self.dtype)
        return QuantizedWeight((codes.to(torch.int16) + 8).to(torch.uint8), scales, None, self.group_size)


def _nearest(position: Tensor) -> Tensor:
    """round and clamp in one pass over memory: with a scale of 1 that is what fake quantization does."""
    return torch.fake_quantize_per_tensor_affine(position, 1.0, 0, int(_LOWEST), int(_HIGHEST))


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return scales + (stored_scale(scales.detach(), dtype).float() - scales).detach()


def _grouped(tensor: Tensor, scales: Tensor) -> Tensor:
    return tensor.reshape(*scales.shape, -1)


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """scale · code, computed in float32; in the dtype of autocast where that is on, without a float32 table first."""
    kind = codes.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else scales.dtype
    product = torch.empty((*scales.shape, codes.numel() // scales.numel()), dtype=dtype, device=codes.device)
    return torch.mul(_grouped(codes, scales), scales[..., None], out=product).reshape(codes.shape)


class _MovingCodes(torch.autograd.Function):
    """scale · round(position); keeps its inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(position, scales)
        return _scaled(_nearest(position), scales)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        position, scales = ctx.saved_tensors
        grouped = _grouped(gradient, scales)
        of_scales = (grouped * _grouped(_nearest(position), scales)).sum(-1)
        return (grouped * scales[..., None]).reshape(position.shape), of_scales


class _FixedCodes(torch.autograd.Function):
    """scale · code for int8 codes."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return _scaled(codes, scales)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        codes, scales = ctx.saved_tensors
        return None, (_grouped(gradient, scales) * _grouped(codes, scales).to(scales.dtype)).sum(-1)
