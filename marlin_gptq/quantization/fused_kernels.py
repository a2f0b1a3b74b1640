"""The Triton kernels behind `fused.py`. Importing this needs Triton.

Blocks and groups lie with a column contiguous ([columns, rows]), so that neighbouring lanes, which hold neighbouring
rows, read neighbouring addresses. The number of rows is never specialized on: one compiled kernel serves every piece of
a weight, which keeps a row's bits the same in all of them. Nor are counts of columns and candidates: what the trial of
`loops.py` has compiled is what a run runs.

No kernel writes what it reads row by row: several lanes may hold one row, and one would read what another has written.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a program: enough programs for every multiprocessor of a 4096-row weight, enough rows for a warp's lanes and
# (search, refit) for one tensor-core tile.
COLUMNS_ROWS, SEARCH_ROWS, REFIT_ROWS, DESCEND_ROWS = 32, 64, 64, 32
# Tile of the trailing update.
PUSH_ROWS, PUSH_COLUMNS = 128, 64

_HALF_EVEN = tl.constexpr(12582912.0)  # 1.5·2²³: adding and taking it away rounds to the nearest even integer


@triton.jit
def _nearest(weight, step):
    """round(weight / step) held in −8 … 7: the code less 8, as `weight.round_to_codes` finds it."""
    return nearest_level(tl.div_rn(weight, step))


@triton.jit
def nearest_level(level):
    return (tl.minimum(tl.maximum(level, -8.0), 7.0) + _HALF_EVEN) - _HALF_EVEN


@triton.jit
def stored_size(scale, tiny, largest):
    """As `grid.stored_scale`, not yet rounded to the stored dtype, whose sizes reach from `tiny` to `largest`."""
    size = tl.maximum(tl.where(scale == 0, 1.0, tl.abs(scale)), tiny, propagate_nan=tl.PropagateNan.ALL)
    size = tl.minimum(size, largest, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(scale < 0, -size, size)


@triton.jit
def _upward(largest):
    """The power of two that brings `largest` to 2¹³ … 2¹⁴, as near as float32 allows, and its inverse."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    power = tl.minimum(tl.maximum(127 + 127 + 13 - exponent, 1), 253)
    return (power << 23).to(tl.float32, bitcast=True), ((254 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(values):
    """float32 below 2¹⁵ as the sum of two float16, 2⁻²² of it or 2⁻²⁵ left over."""
    high = values.to(tl.float16)
    return high, (values - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _image(left, high, low, image):
    """image + left·(high + low), left float16."""
    return tl.dot(left, low, tl.dot(left, high, image))


@triton.jit
def _image_of_weights(weight, high, low, image):
    """image + weight·(high + low) for float32 weight below 2¹⁵."""
    first = weight.to(tl.float16)
    second, third = _halves(weight - first.to(tl.float32))
    return tl.dot(third, high, _image(second, high, low, _image(first, high, low, image)))


@triton.jit
def _columns_of(whitener, start, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Columns start … start + COUNT − 1: as two float16 parts, and what turns their products back."""
    inner, column = tl.arange(0, WIDTH), start + tl.arange(0, COUNT)
    square = tl.load(whitener + inner[:, None] * WIDTH + column[None, :])
    up, down = _upward(tl.max(tl.abs(square), axis=0))
    high, low = _halves(square * up[None, :])
    return high, low, down


@triton.jit(do_not_specialize=["rows", "count"])
def search(weights, whitener, scales, found, rows, count, WIDTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr):
    """weights [WIDTH, rows], whitener V [WIDTH, WIDTH], scales [count, rows] → found [rows].

    A candidate's error is ‖s·(C·V) − w·V‖² with its codes C, which float16 holds exactly; w·V is made once, and V is
    two float16 parts of each column, raised by a power of two. Two products of float16 for a candidate so do what three
    of TF32 would do for s·C − w.

    With STEP = WIDTH the parts of V stay in shared memory, each half of its columns for itself, which registers then
    hold the products of; a smaller STEP takes as many rows of V at a time from the caches, which needs neither.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, STEP)
    inside = row < rows
    weight = tl.load(weights + inner[None, :] * rows + row[:, None], mask=inside[:, None], other=0.0)
    least = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    best = tl.load(scales + row, mask=inside, other=1.0).to(tl.float32)
    if STEP == WIDTH:
        HALF: tl.constexpr = WIDTH // 2
        none = tl.zeros((ROWS, HALF), dtype=tl.float32)
        high0, low0, down0 = _columns_of(whitener, 0, WIDTH, HALF)
        high1, low1, down1 = _columns_of(whitener, HALF, WIDTH, HALF)
        strong, back = _upward(tl.max(tl.abs(weight), axis=1))
        raised = weight * strong[:, None]
        own0 = _image_of_weights(raised, high0, low0, none) * back[:, None]
        own1 = _image_of_weights(raised, high1, low1, none) * back[:, None]
        for candidate in range(count):
            scale = tl.load(scales + candidate * rows + row, mask=inside, other=1.0).to(tl.float32)
            level = nearest_level(weight * tl.div_rn(1.0, scale)[:, None]).to(tl.float16)
            off0 = (_image(level, high0, low0, none) * scale[:, None] - own0) * down0[None, :]
            error = tl.sum(off0 * off0, axis=1)
            off1 = (_image(level, high1, low1, none) * scale[:, None] - own1) * down1[None, :]
            error += tl.sum(off1 * off1, axis=1)
            better = error < least  # the first of equals stays
            least = tl.where(better, error, least)
            best = tl.where(better, scale, best)
    else:
        column = tl.arange(0, WIDTH)
        largest = tl.zeros((WIDTH,), dtype=tl.float32)
        strongest = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, WIDTH, STEP):
            now = start + inner
            factor = tl.load(whitener + now[:, None] * WIDTH + column[None, :])
            largest = tl.maximum(largest, tl.max(tl.abs(factor), axis=0))
            part = tl.load(weights + now[None, :] * rows + row[:, None], mask=inside[:, None], other=0.0)
            strongest = tl.maximum(strongest, tl.max(tl.abs(part), axis=1))
        up, down = _upward(largest)
        strong, back = _upward(strongest)
        own = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for start in range(0, WIDTH, STEP):
            now = start + inner
            high, low = _halves(tl.load(whitener + now[:, None] * WIDTH + column[None, :]) * up[None, :])
            part = tl.load(weights + now[None, :] * rows + row[:, None], mask=inside[:, None], other=0.0)
            own = _image_of_weights(part * strong[:, None], high, low, own)
        own *= back[:, None]
        for candidate in range(count):
            scale = tl.load(scales + candidate * rows + row, mask=inside, other=1.0).to(tl.float32)
            inverse = tl.div_rn(1.0, scale)
            image = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
            for start in range(0, WIDTH, STEP):
                now = start + inner
                high, low = _halves(tl.load(whitener + now[:, None] * WIDTH + column[None, :]) * up[None, :])
                part = tl.load(weights + now[None, :] * rows + row[:, None], mask=inside[:, None], other=0.0)
                image = _image(nearest_level(part * inverse[:, None]).to(tl.float16), high, low, image)
            off = (image * scale[:, None] - own) * down[None, :]
            error = tl.sum(off * off, axis=1)
            better = error < least
            least = tl.where(better, error, least)
            best = tl.where(better, scale, best)
    tl.store(found + row, best.to(found.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "width", "first", "count"])
def columns(
    block, codes, errors, upper, steps, rows, width, first, count,
    OWN_STEPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """count columns from `first` on of block, codes, errors [width, rows]; upper [width, width].

    steps [rows], or [width, rows] with OWN_STEPS.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = column[None, :] * rows + row[:, None]
    weight = tl.load(block + place, mask=inside, other=0.0)
    levels = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    pushed = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for done in range(count):
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
    mine = inside & ((column >= first) & (column < first + count))[None, :]
    tl.store(block + place, weight, mask=inside)
    tl.store(codes + place, (levels + 8.0).to(tl.uint8), mask=mine)
    tl.store(errors + place, pushed, mask=mine)


# Scales of a group begin wherever the group before them ends: one kernel for any alignment.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["scales", "found"])
def refit(
    gradient, codes, scales, found, moves, square, rows, tiny, largest,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr = 32,
):  # fmt: skip
    """gradient, codes, moves [WIDTH, rows], scales and found [rows], square [WIDTH, WIDTH].

    tiny, largest: `grid.scale_range` of the stored dtype of scales.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = row < rows
    place = column[None, :] * rows + row[:, None]
    level = tl.load(codes + place, mask=inside[:, None], other=8).to(tl.float32) - 8.0
    slope = tl.sum(level * tl.load(gradient + place, mask=inside[:, None], other=0.0), axis=1)
    image = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, WIDTH, STEP):
        inner = start + tl.arange(0, STEP)
        part = tl.load(codes + inner[None, :] * rows + row[:, None], mask=inside[:, None], other=8)
        factor = tl.load(square + inner[:, None] * WIDTH + column[None, :])
        image = tl.dot(part.to(tl.float32) - 8.0, factor, image, input_precision="tf32x3")
    curvature = tl.sum(image * level, axis=1)
    old = tl.load(scales + row, mask=inside, other=1.0).to(tl.float32)
    bent = curvature > 0
    best = old + tl.where(bent, tl.div_rn(slope, tl.where(bent, curvature, 1.0)), 0.0)
    new = stored_size(best, tiny, largest).to(found.dtype.element_ty).to(tl.float32)
    step = new - old
    lower = step * step * curvature - 2 * step * slope < 0
    tl.store(found + row, tl.where(lower, new, old).to(found.dtype.element_ty), mask=inside)
    tl.store(moves + place, tl.where(lower, step, 0.0)[:, None] * level, mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "width", "start", "columns"])
def descend(
    gradient, codes, found, moves, square, reach, scales, rows, width, start, columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """gradient, codes, found, moves [width, rows], square [width, width], reach [width], scales [groups, rows]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = row < rows
    slopes = tl.load(
        gradient + column[None, :] * rows + row[:, None], mask=here[:, None] & (column < width)[None, :], other=0.0
    )
    for c in range(width):
        slope = tl.sum(tl.where((column == c)[None, :], slopes, 0.0), axis=1)
        scale = tl.load(scales + (start + c) // columns * rows + row, mask=here, other=1.0).to(tl.float32)
        old = tl.load(codes + c * rows + row, mask=here, other=8).to(tl.float32) - 8.0
        new = nearest_level(old + tl.div_rn(slope * tl.load(reach + c), scale))
        move = (new - old) * scale
        slopes -= move[:, None] * tl.load(square + c * width + column, mask=column < width, other=0.0)[None, :]
        tl.store(found + c * rows + row, (new + 8.0).to(tl.uint8), mask=here)
        tl.store(moves + c * rows + row, move, mask=here)


@triton.jit(do_not_specialize=["rows", "width"])
def push(
    rest, errors, upper, rows, later, rest_stride, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr = 32,
):  # fmt: skip
    """rest [rows, later] −= errors [width, rows] transposed · upper [width, later]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < later)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, STEP):
        inner = tl.arange(0, STEP)
        left = inner < width - start
        # More than 2³¹ elements are possible: what is far is counted in 64 bits.
        far = tl.cast(start, tl.int64)
        error = tl.load(
            errors + far * rows + (inner[None, :] * rows + row[:, None]),
            mask=(row < rows)[:, None] & left[None, :],
            other=0.0,
        )
        factor = tl.load(
            upper + far * later + (inner[:, None] * later + column[None, :]),
            mask=left[:, None] & (column < later)[None, :],
            other=0.0,
        )
        total = tl.dot(error, factor, total, input_precision="tf32x3")
    place = rest + row.to(tl.int64)[:, None] * rest_stride + column[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) - total, mask=inside)
