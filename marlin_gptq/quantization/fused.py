"""GPTQ's two inner loops as one GPU kernel each; without them thousands of small launches rule the time.

`quantize_columns` and `best_scales` have plain torch twins of the same meaning in `columns.py` and `grid.py`, which run
everywhere else and which the tests compare with. Rows are independent, so a program works on a few rows alone.
Triton comes with torch's CUDA builds; where it is missing, `available` says so and the twins run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings none
    triton = None

# Rows of a program: enough programs for every SM of a 4096-row weight, enough rows to fill a warp's lanes.
_ROWS_OF_COLUMNS, _ROWS_OF_SEARCH = 32, 64
_WIDTHS = (32, 64, 128)  # columns of a block or group: powers of two that fit into registers


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return triton is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def fits(columns: int) -> bool:
    """Whether a block or group of so many columns is one that the kernels take."""
    return columns in _WIDTHS


def quantize_columns(block: Tensor, upper: Tensor, steps: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """As `columns.quantize_columns`, in one launch; `block` has one of the widths that `fits` names."""
    width, rows = block.shape
    codes = torch.empty(last - first, rows, dtype=torch.uint8, device=block.device)
    errors = torch.empty(last - first, rows, dtype=torch.float32, device=block.device)
    upper = upper.contiguous()
    _launch(
        _columns_kernel, rows, _ROWS_OF_COLUMNS, block,
        block, upper, steps, codes, errors, rows, steps.stride(0) if steps.dim() == 2 else 0,
        FIRST=first, LAST=last, WIDTH=width, ROWS=_ROWS_OF_COLUMNS, num_warps=4,
    )  # fmt: skip
    return codes, errors


def best_scales(columns: Tensor, whitener: Tensor, bases: Tensor, ratios: Tensor, dtype: torch.dtype) -> Tensor:
    """As `grid.best_scales`, in one launch.

    columns  [columns, rows], float32: the group's weights, a column contiguous.
    bases    [rows, kinds], float32; ratios [candidates], float32.
    → [rows] in `dtype`.
    """
    width, rows = columns.shape
    found = torch.empty(rows, dtype=dtype, device=columns.device)
    limits = torch.finfo(dtype)
    _launch(
        _search_kernel, rows, _ROWS_OF_SEARCH, columns,
        columns, whitener.contiguous(), bases.contiguous(), ratios, found, rows, columns.stride(0),
        limits.tiny, limits.max,
        KINDS=bases.shape[1], CANDIDATES=len(ratios), WIDTH=width, ROWS=_ROWS_OF_SEARCH, num_warps=4,
    )  # fmt: skip
    return found


def _launch(kernel: Any, rows: int, rows_each: int, like: Tensor, *arguments: Any, **meta: Any) -> None:
    if rows == 0:
        return
    with torch.cuda.device(like.device) if like.is_cuda else torch.no_grad():
        kernel[(triton.cdiv(rows, rows_each),)](*arguments, **meta)


if triton is not None:
    _HALF_EVEN = tl.constexpr(12582912.0)  # 1.5·2²³: adding and taking it away rounds to the nearest even integer

    @triton.jit
    def _nearest(weight, step):
        """round(weight/step) − held in −8 … 7, as `round_to_codes` − 8."""
        level = tl.minimum(tl.maximum(tl.div_rn(weight, step), -8.0), 7.0)
        return (level + _HALF_EVEN) - _HALF_EVEN

    @triton.jit
    def _columns_kernel(
        block, upper, steps, codes, errors, rows, step_stride,
        FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = (row < rows)[:, None]
        place = column[None, :] * rows + row[:, None]
        weight = tl.load(block + place, mask=inside, other=0.0)
        levels = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        pushed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for c in range(FIRST, LAST):
            here = (column == c)[None, :]
            original = tl.sum(tl.where(here, weight, 0.0), axis=1)
            step = tl.load(steps + c * step_stride + row, mask=row < rows, other=1.0).to(tl.float32)
            level = _nearest(original, step)
            error = tl.div_rn(original - level * step, tl.load(upper + c * WIDTH + c))
            # The row of U is zero in front of c, so columns that are done stay as they are.
            weight -= error[:, None] * tl.load(upper + c * WIDTH + column)[None, :]
            levels = tl.where(here, level[:, None], levels)
            pushed = tl.where(here, error[:, None], pushed)
        mine = inside & ((column >= FIRST) & (column < LAST))[None, :]
        tl.store(block + place, weight, mask=inside)
        shifted = place - FIRST * rows
        tl.store(codes + shifted, (levels + 8.0).to(tl.uint8), mask=mine)
        tl.store(errors + shifted, pushed, mask=mine)

    @triton.jit
    def _search_kernel(
        columns, whitener, bases, ratios, found, rows, stride, tiny, largest,
        KINDS: tl.constexpr, CANDIDATES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = row < rows
        weight = tl.load(columns + column[None, :] * stride + row[:, None], mask=inside[:, None], other=0.0)
        square = tl.load(whitener + column[:, None] * WIDTH + column[None, :])
        least = tl.full((ROWS,), float("inf"), dtype=tl.float32)
        best = tl.zeros((ROWS,), dtype=tl.float32)
        for candidate in range(KINDS * CANDIDATES):
            base = tl.load(bases + row * KINDS + candidate // CANDIDATES, mask=inside, other=1.0)
            scale = base * tl.load(ratios + candidate % CANDIDATES)
            # As `stored_scale`: never 0, Inf or subnormal, rounded before codes are chosen.
            size = tl.minimum(tl.maximum(tl.where(scale == 0.0, 1.0, tl.abs(scale)), tiny), largest)
            scale = tl.where(scale < 0.0, -size, size).to(found.dtype.element_ty).to(tl.float32)
            difference = _nearest(weight, scale[:, None]) * scale[:, None] - weight
            image = tl.dot(difference, square, input_precision="tf32x3")
            error = tl.sum(image * image, axis=1)
            better = error < least  # the first of equals stays
            least = tl.where(better, error, least)
            best = tl.where(better, scale, best)
        tl.store(found + row, best.to(found.dtype.element_ty), mask=inside)
