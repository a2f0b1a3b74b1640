"""What the tuning does at every step to each weight and each table of logits, as pure functions in plain torch.

`moved_weight`     positions of codes and shifts of scales → the weight as it will be stored
`moved_gradients`  the gradient by that weight → the gradients by both
`differences`      two tables of logits → the divergence of every row, and its gradient

On a GPU `fused_tuning.py` does the same in one launch each; `tuning_loops.py` chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin_gptq.quantization.grid import stored_scale

LOWEST, HIGHEST = -8, 7


def moved_scales(shift: Tensor, start: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """start · (1 + shift), rounded to `scale_dtype`, in float32: the stored step of each group."""
    return stored_scale(start * (1 + shift), scale_dtype).float()


def nearest(position: Tensor) -> Tensor:
    """round and clamp in one pass over memory: with a scale of 1 that is what fake quantization does."""
    return torch.fake_quantize_per_tensor_affine(position, 1.0, 0, LOWEST, HIGHEST)


def scaled(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """scale · code [out_features, in_features], computed in float32, in `dtype` without a float32 table first."""
    product = torch.empty((*scales.shape, codes.numel() // scales.numel()), dtype=dtype, device=codes.device)
    return torch.mul(grouped(codes, scales), scales[..., None], out=product).reshape(codes.shape)


def grouped(tensor: Tensor, scales: Tensor) -> Tensor:
    """[out_features, in_features] as [out_features, groups, columns of a group]."""
    return tensor.reshape(*scales.shape, -1)


def moved_weight(
    position: Tensor, shift: Tensor, start: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """scale · round(position) in `dtype`, [out_features, in_features].

    position     float32 [out_features, in_features] around 0; its nearest integer in −8 … 7 is the code less 8.
    shift, start float32 [out_features, groups]: the scale is start · (1 + shift), rounded to `scale_dtype`.
    """
    return scaled(nearest(position), moved_scales(shift, start, scale_dtype), dtype)


def moved_gradients(
    gradient: Tensor, position: Tensor, shift: Tensor, start: Tensor, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a gradient by `moved_weight` [out_features, in_features] is by position and by shift, float32.

    As if nothing had been rounded, at the codes and scales that were: the straight-through estimator.
    """
    scales = moved_scales(shift, start, scale_dtype)
    outer = grouped(gradient, scales)
    of_scales = (outer * grouped(nearest(position), scales)).sum(-1)
    return (outer * scales[..., None]).reshape(position.shape), of_scales * start


def differences(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(p) ‖ softmax(q)) of each row, in nats, float32 [rows]; and softmax(q) − softmax(p), its gradient by q.

    p, q  float32 [rows, vocab_size], logits; q is used up.
    """
    p, q = torch.log_softmax(p, dim=-1), torch.log_softmax(q, dim=-1)
    probability = p.exp()
    losses = torch.linalg.vecdot(probability, p.sub_(q))
    return losses, q.exp_().sub_(probability)
