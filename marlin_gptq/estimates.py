"""What memory a run will take, before it is started. Pure functions of an `Outline`.

It is the largest of a run's phases, each the sum of what is then alive; the terms follow pipeline.py line by line:

    embed      embedding table + activations
    forward    block + Hessians being summed + what the largest pack of samples needs on its way through the block
               (and, as long as a block is solved in stages, what waits inside it for the next)
    factor     block + Hessians + the matrices that one factorisation works on
    solve      block + Hessians + factor + copies of one stacked weight + scratch of the clipping search in plain torch
               (the fused loops of a GPU need less of it); where several are solved side by side, of all of them
    head       embedding table and output head + what logits of some tokens take, for rounding under both sides
    gradients  block + what a backward pass keeps (+ M of all its linears, as long as it is solved)
    tune       block, once more as it was + what moves with gradient and moments + what a backward pass keeps

docs/benchmarks.md compares them with measured runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from marlin_gptq.estimated_size import output_bytes
from marlin_gptq.job import Job, Plan
from marlin_gptq.modeling.outline import BlockOutline, Outline
from marlin_gptq.modeling.output_gradients import BACKWARD_TOKENS, HEAD_TOKENS
from marlin_gptq.quantization.grid import CLIP_RATIOS, SCRATCH_ELEMENTS
from marlin_gptq.quantization.weight import columns_per_group
from marlin_gptq.tuning.block_memory import backward_bytes, tuning_bytes

# Measured on a CPU, in float32 copies of what they work on (memory at the peak less memory before):
FACTOR_MATRICES = 7.5  # Hessians: mean, damped, flipped, the Cholesky factor, operands of the triangular solve
SOLVE_WEIGHTS = 3.3  # weights: stacked, compensated, codes, trailing update
CLIP_SCRATCH = 5.5  # scratch of the clipping search: scaled values, codes, differences, their image and its square
JUDGE_WEIGHTS = 6  # one linear's weight: dequantized, difference, image, their product in float64
# Counted, not measured, as are the matrices of `_beside_factor` and `_beside_solve`; runs with them lie within the
# same bounds (tests/test_estimates.py).
REFINE_WEIGHTS = 5.5  # weights: as given, dequantized, centred codes, residual, its product with the Hessian
# Of rounding under both sides, weights: as given, dequantized, its errors, moves and targets of half the rows, and
# what refining those takes.
SIDES_WEIGHTS = 6
# Of the K-best search, for each beginning kept: copies of the weight (compensated, once more in order, codes), and
# float32 values for each column of a block (path, traced path, block and its copy).
BEAM_WEIGHTS, BEAM_BLOCK = 2.25, 9
# Values per token and channel alive in a block's forward: residual, norm, attention's operands and result; gate, up,
# their product.
FORWARD_HIDDEN, FORWARD_INNER = 6, 3
# Of weights that are solved side by side on a GPU, whose fused loops have no scratch: float32 matrices like the Hessian
# (itself, its factor), and bytes per weight (stacked, compensated, codes, transposed pieces). Fitted to one run, on an
# H200, less the scratch of cuBLAS for streams that are no longer made.
BESIDE_SQUARES, BESIDE_WEIGHTS = 2, 12
# Bytes that they take at most, where there is more than enough: larger ones fill a GPU alone.
SIDE_BY_SIDE = 12_000_000_000
_STREAMS = 4
Group = TypeVar("Group")


@dataclass(frozen=True)
class Memory:
    """Peak bytes on the device, and of what waits in host memory; phase and block of the device's peak."""

    device: int
    host: int
    phase: str
    block: int


def streams(job: Job) -> int:
    """Sets of activations that wait: those after full-precision blocks too, where somebody asks for them."""
    return 2 if job.corrected or job.tuned else 1


def activation_bytes(outline: Outline, job: Job) -> int:
    """What waits between two blocks."""
    return streams(job) * job.tokens * outline.hidden * job.compute_bytes


def gradient_bytes(outline: Outline, job: Job) -> int:
    """What rounding under both sides keeps from its gradients' passes until a block's turn comes, in host memory:
    inputs of every block and gradients by its outputs, and one set more on the way."""
    return (2 * len(outline.blocks) + 1) * job.graded * outline.hidden * job.compute_bytes


def output_hessian_bytes(block: BlockOutline, job: Job) -> int:
    """M of all linears of a block."""
    return sum(4 * x.out_features**2 for x in block.quantized) if job.graded else 0


def staged_bytes(outline: Outline, job: Job) -> int:
    """What a true-sequential run in stages keeps inside a block, at most: the output of attention and the inputs of the
    down projections (modeling/staged.py), of experts those of all that a token chooses."""
    widths = [0]
    for block in outline.blocks:
        dense = max((x.in_features for x in block.quantized if not x.expert), default=0)
        downs = [x for x in block.quantized if x.expert and x.out_features == outline.hidden]
        inner = max((x.in_features for x in downs), default=0) * outline.experts_per_token
        shared = outline.hidden if experts_of(block) else 0  # what an expert for all tokens returns
        widths.append(outline.hidden + shared + max(dense, inner))
    return (2 if job.corrected else 1) * job.tokens * max(widths) * job.compute_bytes


def ahead_bytes(outline: Outline, job: Job) -> int:
    """The largest block as it waits in host memory, read before its turn; 16 bits a weight are reckoned with."""
    return max((block.parameters for block in outline.blocks), default=0) * job.stored_bytes


def memory(outline: Outline, job: Job, plan: Plan) -> Memory:
    """Peak of a run under a plan. On a CPU device and host are one memory: add the two."""
    table = max((prod(shape) for _, shape in outline.outer), default=0)
    phase, index, device = max(_all_phases(outline, job, plan), key=lambda entry: entry[2])
    waiting = min(2 * max(job.shard_size, table * job.stored_bytes), output_bytes(outline, job.stored_bytes))
    host = waiting + ahead_bytes(outline, job) + (activation_bytes(outline, job) if plan.place == "host" else 0)
    host += gradient_bytes(outline, job) if plan.place != "disk" else 0
    return Memory(device, host, phase, index)


def tuning_memory(outline: Outline, job: Job, plan: Plan) -> int:
    """Peak on the device while blocks are tuned; 0 if none is."""
    return max((size for phase, _, size in _all_phases(outline, job, plan) if phase == "tune"), default=0)


def memory_on_cpu(outline: Outline, job: Job, plan: Plan) -> int:
    """Peak of a run that computes on the CPU: what a GPU would hold and what waits to be written, in one memory."""
    found = memory(outline, job, plan)
    table = max((prod(shape) for _, shape in outline.outer), default=0) * job.stored_bytes
    kept = activation_bytes(outline, job) if plan.place == "device" else 0
    read, written = table + found.host, 2 * found.host  # some versions of safetensors copy what they write
    # Nothing waits yet when the embedding table is read, as stored and as computed with.
    work = found.device + (table if found.phase == "embed" else found.host)
    return max(work, kept + max(read, written))


def hessian_passes(groups: list[tuple[str, int]], hessian_bytes: int | None) -> list[list[str]]:
    """Groups, as (name, in_features), in passes whose Hessians take `hessian_bytes` at most, but for single ones."""
    passes: list[list[str]] = []
    used = 0
    for name, features in groups:
        size = features * features * 4
        if passes and (hessian_bytes is None or used + size <= hessian_bytes):
            passes[-1].append(name)
            used += size
        else:
            passes.append([name])
            used = size
    return passes


def side_by_side(groups: Sequence[tuple[Group, tuple[int, int]]], limit: int, job: Job) -> list[list[Group]]:
    """Groups, with (out_features, in_features) of each one's stacked weight, in batches of at most `limit` bytes.

    A single one may take more. A batch has _STREAMS groups at most: more would leave none of the GPU idle either.
    """
    batches: list[list[Group]] = []
    used = 0
    for group, shape in groups:
        size = beside_bytes(shape, job)
        if batches and used + size <= limit and len(batches[-1]) < _STREAMS:
            batches[-1].append(group)
            used += size
        else:
            batches.append([group])
            used = size
    return batches


def beside_bytes(shape: tuple[int, int], job: Job) -> int:
    """What a weight [out_features, in_features] takes until all of its batch are solved."""
    rows, features = shape
    beams = _beam_bytes(rows, features, job) + job.two_sided * int(4 * rows * (1.5 * rows + SIDES_WEIGHTS * features))
    return (BESIDE_SQUARES + _beside_solve(job)) * 4 * features**2 + BESIDE_WEIGHTS * rows * features + beams


def _all_phases(outline: Outline, job: Job, plan: Plan) -> Iterator[tuple[str, int, int]]:
    """(phase, block, bytes on the device) of a run."""
    kept = activation_bytes(outline, job) if plan.place == "device" else 0
    inside = staged_bytes(outline, job) if plan.staged and job.true_sequential else 0
    table = max((prod(shape) for _, shape in outline.outer), default=0)
    if job.tokens:
        yield "embed", 0, kept + table * job.compute_bytes
    if job.graded:  # both tables, and of logits probabilities, gradients and what makes them
        logits = min(job.longest, HEAD_TOKENS) * (table // max(1, outline.hidden)) * 4 * 3
        yield "head", 0, kept + 2 * table * job.compute_bytes + logits
    for index, block in enumerate(outline.blocks):
        weights = block.parameters * job.compute_bytes
        codes = sum(linear.in_features * linear.out_features for linear in block.quantized)
        # As they were before, to go on in full precision or to learn from.
        weights += codes * job.compute_bytes if job.corrected or job.tuned else 0
        for phase, size in _phases(outline, block, job, plan):
            beside = 0 if phase in ("tune", "gradients") else inside + output_hessian_bytes(block, job)
            yield phase, index, kept + weights + codes + size + beside


def _phases(outline: Outline, block: BlockOutline, job: Job, plan: Plan) -> Iterator[tuple[str, int]]:
    """(phase, bytes beside weights, activations and packed tensors) of one block."""
    widest = max((max(x.in_features, x.out_features) for x in block.linears), default=0)
    inputs = inputs_of(block)
    stages = _stages(block, job)
    passes = [names for stage in stages for names in hessian_passes(stage, plan.hessian_bytes)]
    sizes = {name: features * features * 4 for name, features in inputs}
    hessians = max((sum(sizes[name] for name in names) for names in passes), default=0) if job.tokens else 0
    hessians *= 2 if job.corrected else 1
    inner = max((x.in_features for x in block.linears), default=0)
    per_token = (FORWARD_HIDDEN * outline.hidden + FORWARD_INNER * widest) * job.compute_bytes
    per_token += inner * 4 * ((job.compute_bytes != 4) + job.weighted)  # inputs of a Hessian as float32, and weighted
    if job.corrected:  # all inputs, of the quantized and of the full-precision model, and those of one as float32
        # Those that stages keep (`staged_bytes`) are counted there; the others are as wide as the hidden states.
        staged = plan.staged and job.true_sequential
        inside = outline.hidden if staged else max(sum(width for _, width in stage) for stage in stages)
        per_token += 2 * inside * job.compute_bytes
        per_token += inner * 4 * (1 if job.compute_bytes == 4 else 3)
    yield "forward", hessians + max(job.longest, min(job.tokens, plan.pack_tokens)) * per_token
    for name, features in inputs:
        square = features * features * 4
        if job.tokens:
            yield "factor", hessians + int((FACTOR_MATRICES + _beside_factor(job)) * square)
        stacked = sum(x.out_features for x in block.quantized if x.input == name)
        rows = min(stacked, plan.rows or stacked)
        factored = (2 + _beside_solve(job)) * square if job.tokens else 0
        yield "solve", hessians + factored + _solve_bytes(block, name, stacked, rows, features, job)
    for stage in stages if job.tokens else ():
        shapes = [(sum(x.out_features for x in block.quantized if x.input == name), width) for name, width in stage]
        for batch in side_by_side([(shape, shape) for shape in shapes], plan.side_by_side, job):
            yield "solve", hessians + (len(batch) > 1) * sum(beside_bytes(shape, job) for shape in batch)
    if job.graded:
        pack = min(job.graded, max(job.longest, BACKWARD_TOKENS))
        values = backward_bytes(outline, block, pack, job.longest, job.compute_bytes)
        yield "gradients", values + output_hessian_bytes(block, job)
    if job.tuned is not None and block.quantized:
        yield "tune", tuning_bytes(outline, block, job.tuned, job.tokens, plan.tuned_tokens, job.compute_bytes)


def _beside_factor(job: Job) -> int:
    """Matrices like the Hessian that techniques hold while it is factored: in another order, a first factor, C."""
    return (job.act_order != "none") + (job.act_order == "columns") + job.corrected


def _beside_solve(job: Job) -> int:
    """Those they hold while weights are solved: damped, damped in order, a first factor, C and the Cholesky factor."""
    ordered, columns = job.act_order != "none", job.act_order == "columns"
    damped = job.plain or columns or job.sweeps > 0 or job.corrected
    return damped + (job.plain and ordered) + columns + 2 * job.corrected


def _solve_bytes(block: BlockOutline, name: str, stacked: int, rows: int, features: int, job: Job) -> int:
    weight = rows * features * 4
    whole = stacked * features * 5  # the stacked weight and its codes
    group = max(columns_per_group(features, x.group_size or -1) for x in block.quantized if x.input == name)
    ratios = min(len(CLIP_RATIOS), max(1, SCRATCH_ELEMENTS // max(1, rows * group)))
    scratch = CLIP_SCRATCH * ratios * rows * group * 4 if job.clip and job.tokens else 0.0
    largest = max(x.out_features for x in block.quantized if x.input == name)
    solve = SOLVE_WEIGHTS - 1.25 + (job.act_order != "none") + (job.act_order == "columns") + job.corrected
    refine = (REFINE_WEIGHTS - 1.25 + job.corrected) * weight if job.sweeps and job.tokens else 0.0
    solved = solve * weight + scratch + _beam_bytes(rows, features, job)
    both = 0
    if job.graded and job.tokens:  # beside the weights M damped, and half of its columns
        squares = sum(4 * x.out_features**2 for x in block.quantized if x.input == name)
        both = int(1.5 * squares) + SIDES_WEIGHTS * stacked * features * 4
    return whole + int(max(solved, refine, both, JUDGE_WEIGHTS * largest * features * 4))


def _beam_bytes(rows: int, features: int, job: Job) -> int:
    """What the K-best search takes beside GPTQ's own copies of a weight [rows, features]."""
    if job.beams == 1 or not job.tokens:
        return 0
    copies = BEAM_WEIGHTS * (job.beams - 1) * features
    return int(4 * rows * (copies + BEAM_BLOCK * job.beams * min(job.block_size, features)))


def inputs_of(block: BlockOutline) -> list[tuple[str, int]]:
    """(input, features) of the distinct inputs of a block's quantized linears."""
    return list({x.input: x.in_features for x in block.quantized}.items())


def experts_of(block: BlockOutline) -> int:
    """How many experts a block has."""
    return len({x.input for x in block.linears if x.expert}) // 2


def _stages(block: BlockOutline, job: Job) -> list[list[tuple[str, int]]]:
    """`inputs_of`, those together whose Hessians are summed before any is solved."""
    inputs = inputs_of(block)
    if not job.true_sequential:
        return [inputs]
    experts = {x.input for x in block.quantized if x.expert}
    by_width: dict[int, list[tuple[str, int]]] = {}  # of experts: all gate and up projections, all down projections
    for name, features in inputs:
        if name in experts:
            by_width.setdefault(features, []).append((name, features))
    return [[entry] for entry in inputs if entry[0] not in experts] + list(by_width.values()) or [[]]
