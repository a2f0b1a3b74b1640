"""Which inner loops GPTQ and the refinement run: decided here.

They are fused GPU kernels (`fused.py`) or plain torch (`grid.py`, `columns.py`, `descent.py`).

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
from marlin_gptq.quantization import descent, fused, grid

logger = logging.getLogger(__name__)


class Loops(NamedTuple):
    """The inner loops, and what they are called in logs."""

    name: str
    best_scales: Callable[[Tensor, Tensor, Tensor], Tensor]
    quantize_columns: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], None]
    push_errors: Callable[[Tensor, Tensor, Tensor], None]
    refit_group: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
    descend_columns: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int], None]


PLAIN = Loops(
    "torch",
    grid.best_scales,
    plain.quantize_columns,
    plain.push_errors,
    descent.refit_group,
    descent.descend_columns,
)

_enabled = True
_tried: dict[tuple[torch.device, int | None, torch.dtype], bool] = {}


def set_fused(on: bool) -> None:
    """Allow or forbid the fused loops in this process; allowed at first. For debugging."""
    global _enabled
    _enabled = on


def inner_loops(device: torch.device, columns: int, block_size: int, dtype: torch.dtype) -> Loops:
    """The loops for weights on `device` with groups of `columns`, blocks of `block_size` and scales of `dtype`.

    Groups wider than fused.GROUP_WIDTHS (whole rows) have their scales found in plain torch, as large matrix products,
    and only their columns run fused.
    """
    if block_size > fused.BLOCK_WIDTH or not may_be_fused(device):
        return PLAIN
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    width = columns if columns in fused.GROUP_WIDTHS else None
    return _fused(width) if _works(device, width, dtype) else PLAIN


def may_be_fused(device: torch.device) -> bool:
    """Whether fused kernels are allowed, and could run on `device` as far as can be told without a trial."""
    if not _enabled or device.type != "cuda" or fused.triton_version() is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def reason_of(error: Exception) -> str:
    """What a trial failed with: behind "the fused ones"."""
    lines = str(error).strip().splitlines()
    return f"failed ({type(error).__name__}{': ' + lines[-1] if lines else ''})"


def _fused(width: int | None) -> Loops:
    search, refit = (grid.best_scales, descent.refit_group) if width is None else (fused.best_scales, fused.refit_group)
    name = f"triton {fused.triton_version()}"
    return Loops(name, search, fused.quantize_columns, fused.push_errors, refit, fused.descend_columns)


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
    try:
        expected = _solved(PLAIN, device, width, dtype, None)
        found = _solved(loops, device, width, dtype, expected)
        same = {
            name: float((found[name] == expected[name]).float().mean())
            for name in expected
            if expected[name].dtype != torch.float32
        }
        close = all(
            float((found[name] - expected[name]).norm() / expected[name].norm()) < 0.1
            for name in expected
            if name not in same
        )
    except Exception as error:  # Triton raises what its compiler, ptxas, gcc and the file system do: no list holds it
        return reason_of(error)
    if min(same.values()) < 0.9 or not close:
        shares = ", ".join(f"{share:.0%} of {name}" for name, share in same.items())
        return f"disagree with it on this GPU (equal: {shares})"
    return None


def _solved(
    loops: Loops, device: torch.device, width: int, dtype: torch.dtype, known: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Each loop once over a small problem in groups of `width`; what a loop takes from another is that of `known`."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 128, generator=generator).to(device)
    upper = (torch.eye(128) + 0.05 * torch.randn(128, 128, generator=generator).triu()).to(device)
    behind = torch.randn(128, 160, generator=generator).to(device)
    full = weight[:, :width].abs().amax(dim=1, keepdim=True) * (2 / 15)
    candidates = (full * torch.tensor(grid.CLIP_RATIOS, device=device)).to(dtype)
    made: dict[str, Tensor] = {"scales": loops.best_scales(weight[:, :width], upper[:width, :width], candidates)}
    known = made if known is None else known

    steps = known["scales"].squeeze(1)
    made["codes"] = torch.zeros(128, 70, dtype=torch.uint8, device=device)
    errors, rest = torch.zeros(128, 70, device=device), torch.zeros(70, 160, device=device)
    block = weight.t().contiguous()
    for first in range(0, 128, width):
        loops.quantize_columns(block, made["codes"], errors, upper, steps, first, first + width)
    own = torch.zeros_like(made["codes"])
    loops.quantize_columns(
        weight.neg().t().contiguous(), own, torch.zeros_like(errors), upper, steps.repeat(128, 1), 0, 128
    )
    made["codes of columns"] = own
    loops.push_errors(rest, errors, behind)
    made["rest"] = rest

    codes, hessian = known["codes"], upper.t() @ upper
    scales = steps.repeat(128 // width, 1)
    gradient = (hessian @ (weight.t() - (codes.float() - 8) * steps.float())).contiguous()
    made["refitted scales"], moves = torch.zeros_like(scales), torch.zeros_like(gradient)
    for group in range(len(scales)):
        inside = slice(group * width, (group + 1) * width)
        square = hessian[inside, inside]
        refitted = made["refitted scales"][group]
        loops.refit_group(gradient[inside], codes[inside], scales[group], refitted, moves[inside], square)
    made["moves of scales"] = moves
    made["refined codes"], moves = torch.zeros_like(codes), torch.zeros_like(gradient)
    reach = 1 / hessian.diagonal()
    loops.descend_columns(gradient, codes, made["refined codes"], moves, hessian, reach, scales, 0, width)
    made["moves of codes"] = moves
    return made
