"""Which inner loops GPTQ runs, fused GPU kernels (`fused.py`) or plain torch (`grid.py`, `columns.py`): decided here.

Fused are they where the tensors are on an NVIDIA GPU of compute capability 8.0 or newer, Triton can be imported, nobody
turned them off, and a small trial on that GPU has agreed with plain torch. Whatever goes wrong with Triton (its
compiler, ptxas, a missing C compiler, a cache that cannot be written) shows in the trial, before a run has begun, and
costs one warning: plain torch then does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from marlin_gptq.quantization import columns as plain
from marlin_gptq.quantization import fused, grid

logger = logging.getLogger(__name__)


class Loops(NamedTuple):
    """Three inner loops, and what they are called in logs."""

    name: str
    best_scales: Callable[[Tensor, Tensor, Tensor], Tensor]
    quantize_columns: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], None]
    push_errors: Callable[[Tensor, Tensor, Tensor], None]


PLAIN = Loops("torch", grid.best_scales, plain.quantize_columns, plain.push_errors)

_enabled = True
_tried: dict[tuple[torch.device, int | None, torch.dtype], bool] = {}


def set_fused(on: bool) -> None:
    """Allow or forbid the fused loops in this process; allowed at first. For debugging."""
    global _enabled
    _enabled = on


def inner_loops(device: torch.device, columns: int, block_size: int, dtype: torch.dtype) -> Loops:
    """The loops for weights on `device` with groups of `columns`, blocks of `block_size` and scales of `dtype`.

    Groups wider than fused.GROUP_WIDTHS (whole rows) are searched in plain torch, as large matrix products, and only
    their columns run fused.
    """
    if not _enabled or device.type != "cuda" or block_size > fused.BLOCK_WIDTH or fused.triton_version() is None:
        return PLAIN
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return PLAIN
    width = columns if columns in fused.GROUP_WIDTHS else None
    return _fused(width) if _works(device, width, dtype) else PLAIN


def _fused(width: int | None) -> Loops:
    search = grid.best_scales if width is None else fused.best_scales
    return Loops(f"triton {fused.triton_version()}", search, fused.quantize_columns, fused.push_errors)


def _works(device: torch.device, width: int | None, dtype: torch.dtype) -> bool:
    """Whether the kernels compile for this device and agree with plain torch; the first failure on it is final."""
    if not all(works for (where, *_), works in _tried.items() if where == device):
        return False
    if (device, width, dtype) not in _tried:
        reason = _trial(_fused(width), device, width or fused.BLOCK_WIDTH, dtype)
        _tried[device, width, dtype] = reason is None
        if reason is not None:
            logger.warning("GPTQ's inner loops run in plain torch, which is slower: the fused ones %s", reason)
    return _tried[device, width, dtype]


def _trial(loops: Loops, device: torch.device, width: int, dtype: torch.dtype) -> str | None:
    """What speaks against these loops, from a small problem solved by them and by plain torch; None if nothing."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 128, generator=generator).to(device)
    upper = (torch.eye(128) + 0.05 * torch.randn(128, 128, generator=generator).triu()).to(device)
    behind = torch.randn(128, 160, generator=generator).to(device)
    full = weight[:, :width].abs().amax(dim=1, keepdim=True) * (2 / 15)
    candidates = (full * torch.tensor(grid.CLIP_RATIOS, device=device)).to(dtype)

    def solve(these: Loops, scales: Tensor | None = None) -> tuple[Tensor, ...]:
        found = these.best_scales(weight[:, :width], upper[:width, :width], candidates)
        block, rest = weight.t().contiguous(), torch.zeros(70, 160, device=device)
        codes, errors = torch.zeros_like(block, dtype=torch.uint8), torch.zeros_like(block)
        steps = (found if scales is None else scales).squeeze(1)
        for first in range(0, 128, width):
            these.quantize_columns(block, codes, errors, upper, steps, first, first + width)
        these.push_errors(rest, errors, behind)
        return found, codes, rest

    try:
        expected = solve(PLAIN)
        found = solve(loops, expected[0])
        same = [float((one == other).float().mean()) for one, other in zip(found[:2], expected[:2], strict=True)]
        distance = float((found[2] - expected[2]).norm() / expected[2].norm())
    except Exception as error:  # Triton raises what its compiler, ptxas, gcc and the file system do: no list holds it
        lines = str(error).strip().splitlines()
        return f"failed ({type(error).__name__}{': ' + lines[-1] if lines else ''})"
    if min(same) < 0.9 or not distance < 0.1:
        return f"disagree with it on this GPU (equal: {same[0]:.0%} of scales, {same[1]:.0%} of codes)"
    return None
