"""Scales of one group: where the 16 steps of a symmetric grid lie.

The full grid spans ±absmax: scale = 2·absmax/15. Clipping shrinks it by a ratio p, which trades the error of the few
largest weights against that of all others; the best p is searched under the error GPTQ will really see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# p = 1, 0.99, …, 0.25, as the original Marlin repository searches.
CLIP_RATIOS = tuple(round(1 - 0.01 * step, 2) for step in range(76))
# Scratch of the search: rows × columns × candidates tried at once, in elements of float32. 64 MiB on a GPU, where a
# launch costs more than its memory; half a megabyte on a CPU, which keeps it in its caches.
SCRATCH_ELEMENTS, SCRATCH_ELEMENTS_WITHOUT_GPU = 1 << 24, 1 << 17


def full_scale(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """2·absmax/15 per row of weight [rows, columns], rounded to the stored dtype → [rows, 1].

    A row of zeros gets scale 1, so that no scale is ever 0.
    """
    return stored_scale(weight.float().abs().amax(dim=1, keepdim=True) * (2 / 15), dtype)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the stored dtype before codes are chosen; never 0 or Inf.

    The sign stays: a negative scale turns the grid −8 … 7 round.
    """
    smallest, largest = scale_range(dtype)
    size = torch.where(scale == 0, torch.ones_like(scale), scale.abs()).clamp(smallest, largest)
    return size.copysign(torch.where(scale == 0, size, scale)).to(dtype)


def scale_range(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest size that a scale may have.

    Subnormal numbers of float16, 2⁻²⁴ and its multiples, are as good as others: kernels multiply with them exactly, as
    every product of theirs is one of float32 or keeps subnormals. Those of bfloat16 would be so in float32 too, where
    quotients by them overflow.
    """
    limits = torch.finfo(dtype)
    return max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny), limits.max


def share_too_small(weight: Tensor, group_columns: int, dtype: torch.dtype) -> float:
    """Of the sum of squares of weight [rows, columns]: what lies in groups that no scale of `dtype` is fine enough for.

    From two of the smallest scales on, the error of a group is at most 1.2 times that of a fine scale.
    """
    groups = weight.float().reshape(len(weight), -1, group_columns)
    sizes = groups.abs().amax(dim=-1)
    coarse = sizes * (2 / 15) < 2 * scale_range(dtype)[0]
    energy = (groups / sizes.max().clamp_min(scale_range(torch.float32)[0])).square().sum(dim=-1)
    return float((energy * coarse).sum(dtype=torch.float64) / energy.sum(dtype=torch.float64).clamp_min(1e-300))


def signed_scale(weight: Tensor) -> Tensor:
    """Per row of weight [rows, columns] the scale −extremum/8, which puts the largest weight on code −8 → [rows, 1].

    The symmetric grid reaches −8 on one side and 7 on the other; the sign of the scale chooses which side the
    extremum is on, so that the step is 1/8 of it instead of 2/15. Known as full-range symmetric quantization (Cheng
    et al., "Optimize Weight Rounding via Signed Gradient Descent", arXiv 2309.05516, use it).
    """
    place = weight.abs().argmax(dim=1, keepdim=True)
    return weight.gather(1, place).float() / -8


def clipped_scale(
    weight: Tensor,
    upper: Tensor,
    dtype: torch.dtype,
    *,
    signed: bool = False,
    whitener: Tensor | None = None,
    search: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Per row the scale p·2·absmax/15 with the least ‖(Q(w) − w)·U⁻¹‖² → [rows, 1] in the stored dtype.

    weight  [rows, columns], the group as GPTQ sees it now (already compensated for earlier columns).
    upper   [columns, columns], the group's diagonal block of U: U⁻¹·U⁻ᵀ is the Hessian of the group given that
            the columns after it are free to compensate.
    signed  try p times the `signed_scale` and p·absmax/7 as well.
    whitener  another V in the place of U⁻¹: the error is then ‖(Q(w) − w)·V‖², for V·Vᵀ the Hessian of the group.
    search  what finds the best of the candidates; `best_scales`, or its fused twin.
    Of equal errors the first wins: the largest p, the unsigned grid. Reference: the recipe of the original Marlin
    repository.
    """
    weight = weight.float()
    if whitener is None:
        whitener = inverse_of_upper(upper.float())
    largest = weight.abs().amax(dim=1, keepdim=True)
    full = largest * (2 / 15)
    bases = [full, signed_scale(weight), largest / 7] if signed else [full]
    ratios = _ratios(CLIP_RATIOS, weight.device)
    candidates = stored_scale(torch.cat([base * ratios for base in bases], dim=1), dtype)
    return (search or best_scales)(weight, whitener, candidates)


def inverse_of_upper(upper: Tensor) -> Tensor:
    """U⁻¹ of upper triangular float32 [..., columns, columns]."""
    identity = torch.eye(upper.shape[-1], dtype=torch.float32, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)


@functools.lru_cache(maxsize=16)
def _ratios(ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device, where copying them for every group would wait for all that the GPU has to do."""
    return torch.tensor(ratios, dtype=torch.float32, device=device)


def best_scales(weight: Tensor, whitener: Tensor, scales: Tensor) -> Tensor:
    """Per row the candidate with the least ‖(Q(w) − w)·V‖² → [rows, 1]; of equal errors the first.

    weight float32 [rows, columns]; whitener V float32 [columns, columns]; scales [rows, candidates] of any sign, in the
    stored dtype, none of them 0. Candidates are tried as many at once as the scratch allows, each step in its place.
    """
    rows, columns = weight.shape
    best_error = torch.full((rows, 1), torch.inf, device=weight.device)
    best_scale = scales[:, :1]
    scratch = SCRATCH_ELEMENTS if weight.is_cuda else SCRATCH_ELEMENTS_WITHOUT_GPU
    at_once = max(1, scratch // max(1, rows * columns))
    for chunk in scales.split(at_once, dim=1):
        tried = chunk.t().unsqueeze(-1).float()  # [candidates, rows, 1]
        difference = (weight / tried).round_().clamp_(-8, 7).mul_(tried).sub_(weight)  # `round_to_codes` less 8
        errors = (difference @ whitener).square_().sum(dim=-1)  # [candidates, rows]
        error, index = errors.min(dim=0)  # the first of equals
        better = error.unsqueeze(1) < best_error
        chosen = chunk.gather(1, index.unsqueeze(1))
        best_scale = torch.where(better, chosen, best_scale)
        best_error = torch.where(better, error.unsqueeze(1), best_error)
    return best_scale
