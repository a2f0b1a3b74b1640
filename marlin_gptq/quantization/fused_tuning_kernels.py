"""The Triton kernels behind `fused_tuning.py`. Importing this needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from marlin_gptq.quantization.fused_kernels import nearest_level, stored_size

# Groups of a program.
GROUPS = 8


@triton.jit
def _moved_scale(shift, start, group, inside, tiny, largest, BRAIN: tl.constexpr):
    """As `tuning_steps.moved_scales`."""
    scale = tl.load(start + group, mask=inside, other=1.0) * (1.0 + tl.load(shift + group, mask=inside, other=0.0))
    stored = stored_size(scale, tiny, largest)
    return stored.to(tl.bfloat16).to(tl.float32) if BRAIN else stored.to(tl.float16).to(tl.float32)


@triton.jit(do_not_specialize=["groups", "columns"])
def moved_weight(
    position, shift, start, weight, groups, columns, tiny, largest,
    BRAIN: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr = GROUPS,
):  # fmt: skip
    """position, weight [groups, columns]; shift, start [groups]: the groups of all rows one after the other.

    tiny, largest: `grid.scale_range` of the stored dtype of scales; BRAIN: it is bfloat16, else float16.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    scale = _moved_scale(shift, start, group, inside, tiny, largest, BRAIN)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        there = inside[:, None] & (column < columns)[None, :]
        place = group[:, None] * columns + column[None, :]
        level = nearest_level(tl.load(position + place, mask=there, other=0.0))
        tl.store(weight + place, (scale[:, None] * level).to(weight.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["groups", "columns"])
def moved_gradients(
    gradient, position, shift, start, of_position, of_shift, groups, columns, tiny, largest,
    BRAIN: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr = GROUPS,
):  # fmt: skip
    """gradient, of_position [groups, columns], of_shift [groups]; the others as of `moved_weight`."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    scale = _moved_scale(shift, start, group, inside, tiny, largest, BRAIN)
    total = tl.zeros((GROUPS, WIDTH), dtype=tl.float32)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        there = inside[:, None] & (column < columns)[None, :]
        place = group[:, None] * columns + column[None, :]
        outer = tl.load(gradient + place, mask=there, other=0.0).to(tl.float32)
        total += outer * nearest_level(tl.load(position + place, mask=there, other=0.0))
        tl.store(of_position + place, outer * scale[:, None], mask=there)
    of_scale = tl.sum(total, axis=1)
    tl.store(of_shift + group, of_scale * tl.load(start + group, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["vocabulary"])
def differences(p, q, losses, vocabulary, WIDTH: tl.constexpr):
    """p, q [rows, vocabulary], losses [rows]; a row a program. q becomes softmax(q) − softmax(p).

    WIDTH is no smaller than a program's threads, so that what a thread overwrites nobody else reads.
    """
    row = tl.program_id(0).to(tl.int64)
    p += row * vocabulary
    q += row * vocabulary
    lane = tl.arange(0, WIDTH)
    top_p, top_q = tl.full((WIDTH,), float("-inf"), tl.float32), tl.full((WIDTH,), float("-inf"), tl.float32)
    sum_p, sum_q = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, vocabulary, WIDTH):
        there = first + lane < vocabulary
        top_p, sum_p = _grown(top_p, sum_p, tl.load(p + first + lane, mask=there, other=float("-inf")))
        top_q, sum_q = _grown(top_q, sum_q, tl.load(q + first + lane, mask=there, other=float("-inf")))
    whole_p, whole_q = _logarithm(top_p, sum_p), _logarithm(top_q, sum_q)
    loss = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, vocabulary, WIDTH):
        there = first + lane < vocabulary
        log_p = tl.load(p + first + lane, mask=there, other=0.0) - whole_p
        log_q = tl.load(q + first + lane, mask=there, other=0.0) - whole_q
        probability = tl.exp(log_p)
        loss += tl.where(there, probability * (log_p - log_q), 0.0)
        tl.store(q + first + lane, tl.exp(log_q) - probability, mask=there)
    tl.store(losses + row, tl.sum(loss, axis=0))


@triton.jit
def _grown(top, total, values):
    """Each lane's largest value and Σ exp(value − largest), with one value more; −inf is none."""
    larger = tl.maximum(top, values)
    finite = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, total * tl.exp(top - finite) + tl.exp(values - finite)


@triton.jit
def _logarithm(top, total):
    """log Σ exp over all lanes."""
    largest = tl.max(top, axis=0)
    return largest + tl.log(tl.sum(total * tl.exp(top - largest), axis=0))
