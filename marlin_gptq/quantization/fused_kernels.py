"""The Triton kernels behind `fused.py`. Importing this needs Triton.

Blocks and groups lie with a column contiguous ([columns, rows]), so that neighbouring lanes, which hold neighbouring
rows, read neighbouring addresses. The number of rows is never specialized on: one compiled kernel serves every piece of
a weight, which keeps a row's bits the same in all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a program: enough programs for every multiprocessor of a 4096-row weight, enough rows for a warp's lanes and
# (search) for one tensor-core tile.
COLUMNS_ROWS, SEARCH_ROWS = 32, 64
# Tile of the trailing update.
PUSH_ROWS, PUSH_COLUMNS = 128, 128

_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5·2²³: adding and taking it away rounds to the nearest even integer


@triton.jit
def _nearest(weight, step):
    """round(weight / step) held in −8 … 7: the code less 8, as `weight.round_to_codes` finds it."""
    level = tl.minimum(tl.maximum(tl.div_rn(weight, step), -8.0), 7.0)
    return (level + _HALF_EVEN) - _HALF_EVEN


@triton.jit(do_not_specialize=["rows"])
def search(
    weights, whitener, scales, found, rows,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weights [WIDTH, rows], whitener [WIDTH, WIDTH], scales [COUNT, rows] → found [rows].

    With STEP = WIDTH weights stay in registers and both parts of the whitener in shared memory; a smaller STEP takes
    as many columns at a time from the caches, which needs neither of them.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inner = tl.arange(0, STEP)
    inside = row < rows
    weight = tl.load(weights + inner[None, :] * rows + row[:, None], mask=inside[:, None], other=0.0)
    square = tl.load(whitener + inner[:, None] * WIDTH + column[None, :])
    least = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    best = tl.load(scales + row, mask=inside, other=1.0).to(tl.float32)
    for candidate in range(COUNT):
        scale = tl.load(scales + candidate * rows + row, mask=inside, other=1.0).to(tl.float32)
        if STEP == WIDTH:
            difference = _nearest(weight, scale[:, None]) * scale[:, None] - weight
            image = tl.dot(difference, square, input_precision="tf32x3")
        else:
            image = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
            for start in range(0, WIDTH, STEP):
                now = start + inner
                part = tl.load(weights + now[None, :] * rows + row[:, None], mask=inside[:, None], other=0.0)
                difference = _nearest(part, scale[:, None]) * scale[:, None] - part
                factor = tl.load(whitener + now[:, None] * WIDTH + column[None, :])
                image = tl.dot(difference, factor, image, input_precision="tf32x3")
        error = tl.sum(image * image, axis=1)
        better = error < least  # the first of equals stays
        least = tl.where(better, error, least)
        best = tl.where(better, scale, best)
    tl.store(found + row, best.to(found.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width", "first"])
def columns(
    block, codes, errors, upper, steps, rows, width, first,
    COUNT: tl.constexpr, OWN_STEPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """COUNT columns from `first` on of block, codes, errors [width, rows]; upper [width, width].

    steps [rows], or [width, rows] with OWN_STEPS.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = column[None, :] * rows + row[:, None]
    weight = tl.load(block + place, mask=inside, other=0.0)
    levels = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    pushed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for done in range(COUNT):
        c = first + done
        here = (column == c)[None, :]
        original = tl.sum(tl.where(here, weight, 0.0), axis=1)
        own = c * rows if OWN_STEPS else 0
        step = tl.load(steps + own + row, mask=row < rows, other=1.0).to(tl.float32)
        level = _nearest(original, step)
        error = tl.div_rn(original - level * step, tl.load(upper + c * width + c))
        behind = (column > c) & (column < width)
        weight -= error[:, None] * tl.load(upper + c * width + column, mask=behind, other=0.0)[None, :]
        levels = tl.where(here, level[:, None], levels)
        pushed = tl.where(here, error[:, None], pushed)
    mine = inside & ((column >= first) & (column < first + COUNT))[None, :]
    tl.store(block + place, weight, mask=inside)
    tl.store(codes + place, (levels + 8.0).to(tl.uint8), mask=mine)
    tl.store(errors + place, pushed, mask=mine)


@triton.jit(do_not_specialize=["rows"])
def push(
    rest, errors, upper, rows, later, rest_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr = 32,
):  # fmt: skip
    """rest [rows, later] −= errors [WIDTH, rows] transposed · upper [WIDTH, later]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < later)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, WIDTH, STEP):
        inner = start + tl.arange(0, STEP)
        left = inner < WIDTH
        error = tl.load(
            errors + inner[None, :] * rows + row[:, None], mask=(row < rows)[:, None] & left[None, :], other=0.0
        )
        factor = tl.load(
            upper + inner[:, None] * later + column[None, :],
            mask=left[:, None] & (column < later)[None, :],
            other=0.0,
        )
        total = tl.dot(error, factor, total, input_precision="tf32x3")
    # More than 2³¹ elements are possible: a row begins at a 64-bit offset.
    place = rest + row.to(tl.int64)[:, None] * rest_stride + column[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) - total, mask=inside)
