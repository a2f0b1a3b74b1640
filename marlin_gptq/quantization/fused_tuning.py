"""The functions of `tuning_steps.py` as one GPU launch each, written in Triton (`fused_tuning_kernels.py`).

A linear's weight and gradients are a dozen small launches in plain torch, for every linear at every step; a table of
logits is read and written eight times, here three times. `moved_weight` gives the bits of its twin; sums over a group's
columns and a row's vocabulary are added up in another order.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from marlin_gptq.quantization.fused import launch
from marlin_gptq.quantization.grid import scale_range

# Columns of a group, and logits of a row, that a program reads at a time.
_COLUMNS, _LOGITS = 128, 4096


def moved_weight(
    position: Tensor, shift: Tensor, start: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """As `tuning_steps.moved_weight`."""
    kernels = _kernels()
    columns = position.numel() // start.numel()
    weight = torch.empty(position.shape, dtype=dtype, device=position.device)
    launch(
        kernels.moved_weight, (start.numel(), kernels.GROUPS), position.device,
        position.contiguous(), shift.contiguous(), start.contiguous(), weight, start.numel(), columns,
        *scale_range(scale_dtype),
        BRAIN=scale_dtype == torch.bfloat16, WIDTH=_width(columns), num_warps=4,
    )  # fmt: skip
    return weight


def moved_gradients(
    gradient: Tensor, position: Tensor, shift: Tensor, start: Tensor, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `tuning_steps.moved_gradients`."""
    kernels = _kernels()
    columns = position.numel() // start.numel()
    of_position, of_shift = torch.empty_like(position), torch.empty_like(start)
    launch(
        kernels.moved_gradients, (start.numel(), kernels.GROUPS), position.device,
        gradient.contiguous(), position.contiguous(), shift.contiguous(), start.contiguous(), of_position, of_shift,
        start.numel(), columns, *scale_range(scale_dtype),
        BRAIN=scale_dtype == torch.bfloat16, WIDTH=_width(columns), num_warps=4,
    )  # fmt: skip
    return of_position, of_shift


def differences(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """As `tuning_steps.differences`; the gradient takes the place of q."""
    rows, vocabulary = q.shape
    losses = torch.empty(rows, dtype=torch.float32, device=q.device)
    p, q = p.contiguous(), q.contiguous()
    launch(_kernels().differences, (rows, 1), q.device, p, q, losses, vocabulary, WIDTH=_LOGITS, num_warps=8)
    return losses, q


def _width(columns: int) -> int:
    return 1 << (min(_COLUMNS, columns) - 1).bit_length()  # Triton's ranges are powers of two


def _kernels() -> ModuleType:
    from marlin_gptq.quantization import fused_tuning_kernels  # needs Triton

    return fused_tuning_kernels
