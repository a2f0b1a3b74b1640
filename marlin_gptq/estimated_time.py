"""How long a run will take on a device, before it is started. Pure functions of an `Outline`.

docs/benchmarks.md compares it with measured runs.
"""

from __future__ import annotations

from marlin_gptq.estimates import experts_of, inputs_of
from marlin_gptq.job import Job
from marlin_gptq.modeling.outline import BlockOutline, Outline
from marlin_gptq.quantization.grid import CLIP_RATIOS
from marlin_gptq.quantization.two_sided import SWEEPS

# Measured time over what is counted: five runs on a CPU took 1.13 to 1.39 of it.
OTHER_WORK = 1.25
# Multiplications of a matrix product in the time that the clipping search takes for a weight at one ratio: on a CPU 730
# (one thread), on an H200 800 (36 ms for the weights of a 7B's block).
TRY_PRODUCTS = 750
# Of the K-best search: seconds of starting a column's work on a GPU (an H200 with seven other runs: 3.4e-4 to 4.2e-4),
# and its work in tries of the clipping search for each weight (CPU: 5 to 10).
BEAM_COLUMN_SECONDS, BEAM_TRIES = 4e-4, 7


def seconds(outline: Outline, job: Job, products_per_second: float, staged: bool = False) -> float:
    """Rough time of a run, loading and saving aside: the sum of `block_seconds`."""
    return sum(block_seconds(outline, job, products_per_second, staged))


def block_seconds(outline: Outline, job: Job, products_per_second: float, staged: bool = False) -> list[float]:
    """Rough time of each block of a run; `staged` as in its plan.

    From the multiplications of a large matrix product that the device does in a second. Counted are two passes of all
    tokens (calibrate, then the quantized block; in stages they are one), the Hessians of the distinct inputs, their
    factors, GPTQ's trailing updates, and the clipping search, with what the techniques of the recipe add to them;
    OTHER_WORK stands for the rest.
    """
    if not job.tokens:
        return [0.0] * len(outline.blocks)
    products = [
        _passes(outline, block, job, staged) + _solving(block, job) + _techniques(block, job)
        for block in outline.blocks
    ]
    columns = [sum(features for _, features in inputs_of(block)) * (job.beams > 1) for block in outline.blocks]
    return [
        OTHER_WORK * (count / products_per_second + starts * BEAM_COLUMN_SECONDS)
        for count, starts in zip(products, columns, strict=True)
    ]


def _passes(outline: Outline, block: BlockOutline, job: Job, staged: bool) -> float:
    """Multiplications of the passes of all tokens, and of the Hessians."""
    # Without and with a corrected target. Those of true-sequential calibration are counted for a Llama.
    passes = ((1, 2) if staged else (2.3, 4.5) if job.true_sequential else (2, 3))[job.corrected]
    share = {True: outline.experts_per_token / max(1, experts_of(block)), False: 1.0}
    linears = sum(share[x.expert] * x.in_features * x.out_features for x in block.linears)
    hessians = sum(share[".experts." in name] * features**2 for name, features in inputs_of(block))
    return job.tokens * (passes * linears + (2 if job.corrected else 1) * hessians)


def _solving(block: BlockOutline, job: Job) -> float:
    """Multiplications of the factors, the trailing updates and the searches."""
    candidates = len(CLIP_RATIOS) * job.clip * (3 if job.signed else 1)
    updates = 0.5 + 4 * job.sweeps + 2 * job.corrected  # products of a weight with a matrix like the Hessian
    if job.beams > 1:  # what the K-best search takes more than GPTQ
        candidates += BEAM_TRIES * job.beams
        updates += 0.5 * (job.beams - 1)
    products: float = sum((3 if job.act_order == "columns" else 2) * features**3 for _, features in inputs_of(block))
    for x in block.quantized:
        products += x.out_features * x.in_features * (updates * x.in_features + candidates * TRY_PRODUCTS)
    return products


def _techniques(block: BlockOutline, job: Job) -> float:
    """Multiplications of rounding under both sides, and of a block's own tuning."""
    products = 0.0
    if job.graded:  # a forward, and twice a forward and a backward pass; M; the sweeps
        products += 7 * job.graded * sum(x.out_features * x.in_features for x in block.linears)
        products += sum(job.graded * x.out_features**2 for x in block.quantized)
        for x in block.quantized:  # of a sweep one, and four with the refinement; one before the first
            products += (SWEEPS + 1) * x.out_features**2 * x.in_features
            products += (4 * SWEEPS + 1) * x.out_features * x.in_features**2
    return products + _tuning(block, job)


def tuning_products(outline: Outline, job: Job) -> float:
    """Multiplications of the tuning of all blocks."""
    return sum(_tuning(block, job) for block in outline.blocks)


def _tuning(block: BlockOutline, job: Job) -> float:
    """All tokens in full precision for the target; in each step a forward, and twice as much backward."""
    if job.tuned is None:
        return 0.0
    weights = sum(x.out_features * x.in_features for x in block.linears)
    return weights * (job.tokens + 3.0 * job.tuned.steps * job.tuned.step_tokens)
