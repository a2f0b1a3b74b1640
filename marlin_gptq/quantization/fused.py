"""The inner loops of GPTQ and of the refinement as one GPU launch each: else thousands of small ones rule the time.

`best_scales` (twin in `grid.py`), `quantize_columns` and `push_errors` (twins in `columns.py`), `refit_group` and
`descend_columns` (twins in `descent.py`) take and give the same tensors as their twins in plain torch, written in
Triton (`fused_kernels.py`). `loops.py` decides where they run.

What differs from the twins is the rounding of float32 sums, nothing else:
- `push_errors` and `refit_group` multiply on tensor cores, each float32 factor as two TF32 parts and three products
  ("tf32x3", about 2⁻²¹ relative), and add up in another order than the library that torch calls; `best_scales` takes
  s·(C·V) − w·V for (s·C − w)·V, C being exact in float16 and V two float16 parts (2⁻²² of it), and finds C by a
  product with 1/s;
- `quantize_columns` and `descend_columns` subtract error·U and move·H with one rounding (a fused multiply-add) where
  torch may round the product too.
Quotients, codes and stored scales that a result holds are rounded exactly as in the twins. A weight that lies midway
between two codes, or a row with two scales of nearly equal error, may so fall the other way, and what comes after it in
the row follows.

A row's result does not depend on the rows beside it: every program works on whole rows of one fixed tile in one fixed
order, and no code is specialized to the number of rows. A weight solved in pieces, or by several GPUs of one kind,
gives the bits that it gives in one piece; two runs give the same bits.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.quantization.grid import scale_range

# Columns of a group that `best_scales` and `refit_group` take: powers of two whose square fits into shared
# memory.
GROUP_WIDTHS = (32, 64, 128)
# Columns of a block that `quantize_columns` and `descend_columns` take at most: what a program's rows hold in
# registers.
BLOCK_WIDTH = 128


@functools.cache
def triton_version() -> str | None:
    """The version of Triton, which comes with torch's CUDA builds for Linux; None where it cannot be imported."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def best_scales(weight: Tensor, whitener: Tensor, scales: Tensor) -> Tensor:
    """As `grid.best_scales`, for a group of one of GROUP_WIDTHS columns, in one launch."""
    rows, width = weight.shape
    columns, candidates = weight.t().contiguous(), scales.t().contiguous()
    found = torch.empty(rows, dtype=scales.dtype, device=weight.device)
    kernels = _kernels()
    # Hopper's tensor cores read the whitener's parts from shared memory, which holds all of them; others load it bit by
    # bit into more warps, so that registers suffice.
    step, warps = (width, 4) if _capability(weight.device)[0] == 9 else (16, 8)
    launch(
        kernels.search, (rows, kernels.SEARCH_ROWS), weight.device,
        columns, whitener.contiguous(), candidates, found, rows, candidates.shape[0],
        WIDTH=width, STEP=step, ROWS=kernels.SEARCH_ROWS, num_warps=warps,
    )  # fmt: skip
    return found.unsqueeze(1)


def quantize_columns(
    block: Tensor, codes: Tensor, errors: Tensor, upper: Tensor, steps: Tensor, first: int, last: int
) -> None:
    """As `columns.quantize_columns`, for a block of at most BLOCK_WIDTH columns, in one launch."""
    width, rows = block.shape
    kernels = _kernels()
    launch(
        kernels.columns, (rows, kernels.COLUMNS_ROWS), block.device,
        block, codes, errors, upper.contiguous(), steps.contiguous(), rows, width, first, last - first,
        OWN_STEPS=steps.dim() == 2, WIDTH=BLOCK_WIDTH, ROWS=kernels.COLUMNS_ROWS, num_warps=4,
    )  # fmt: skip


def push_errors(rest: Tensor, errors: Tensor, upper: Tensor) -> None:
    """As `columns.push_errors`, in one launch; a row of `rest` is contiguous."""
    (rows, later), width = rest.shape, errors.shape[0]
    kernels = _kernels()
    launch(
        kernels.push, (rows, kernels.PUSH_ROWS, later, kernels.PUSH_COLUMNS), rest.device,
        rest, errors, upper.contiguous(), rows, later, rest.stride(0), width,
        ROWS=kernels.PUSH_ROWS, COLUMNS=kernels.PUSH_COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip


def refit_group(gradient: Tensor, codes: Tensor, scales: Tensor, found: Tensor, moves: Tensor, square: Tensor) -> None:
    """As `descent.refit_group`, for a group of one of GROUP_WIDTHS columns, in one launch."""
    width, rows = gradient.shape
    kernels = _kernels()
    launch(
        kernels.refit, (rows, kernels.REFIT_ROWS), gradient.device,
        gradient, codes, scales, found, moves, square.contiguous(), rows, *scale_range(scales.dtype),
        WIDTH=width, ROWS=kernels.REFIT_ROWS, num_warps=8,
    )  # fmt: skip


def descend_columns(
    gradient: Tensor,
    codes: Tensor,
    found: Tensor,
    moves: Tensor,
    square: Tensor,
    reach: Tensor,
    scales: Tensor,
    start: int,
    columns: int,
) -> None:
    """As `descent.descend_columns`, for a block of at most BLOCK_WIDTH columns, in one launch; leaves the gradient."""
    width, rows = gradient.shape
    kernels = _kernels()
    launch(
        kernels.descend, (rows, kernels.DESCEND_ROWS), gradient.device,
        gradient, codes, found, moves, square.contiguous(), reach.contiguous(), scales, rows, width, start, columns,
        WIDTH=BLOCK_WIDTH, ROWS=kernels.DESCEND_ROWS, num_warps=4,
    )  # fmt: skip


def _capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU; (0, 0) for the CPU, where Triton's interpreter runs the kernels."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _kernels() -> ModuleType:
    from marlin_gptq.quantization import fused_kernels  # needs Triton

    return fused_kernels


def launch(kernel: Any, extent: tuple[int, ...], device: torch.device, *arguments: Any, **meta: Any) -> None:
    """Run `kernel` over extent = (size, tile size, …) in programs of one tile each."""
    grid = tuple(-(-size // tile) for size, tile in zip(extent[::2], extent[1::2], strict=True))
    if all(grid):
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **meta)
