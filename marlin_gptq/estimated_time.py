"""How long a run will take on a device, before it is started. Pure functions of an `Outline`.

docs/benchmarks.md compares it with measured runs.
"""

from __future__ import annotations

from marlin_gptq.estimates import experts_of, inputs_of
from marlin_gptq.job import Job
from marlin_gptq.modeling.outline import Outline
from marlin_gptq.quantization.grid import CLIP_RATIOS
from marlin_gptq.quantization.two_sided import SWEEPS

# Measured time over what `seconds` counts: five runs on a CPU took 1.13 to 1.39 of it.
OTHER_WORK = 1.25
# Of the K-best search: seconds of starting a column's work on a GPU (an H200 with seven other runs: 3.4e-4 to 4.2e-4),
# and its work in tries of the clipping search for each weight (CPU: 5 to 10).
BEAM_COLUMN_SECONDS, BEAM_TRIES = 4e-4, 7


def seconds(
    outline: Outline, job: Job, products_per_second: float, clip_values_per_second: float, staged: bool = False
) -> float:
    """Rough time of a run, loading and saving aside; `staged` as in its plan.

    From two rates of the device: multiplications of a large matrix product, and weights that the clipping search tries
    at one ratio. Counted are two passes of all tokens (calibrate, then the quantized block; in stages they are one),
    the Hessians of the distinct inputs, their factors, GPTQ's trailing updates, and the clipping search, with what the
    techniques of the recipe add to them; OTHER_WORK stands for the rest.
    """
    products, tried = 0.0, 0.0
    # Of all tokens: without and with a corrected target. Those of true-sequential calibration are counted for a Llama.
    passes = ((1, 2) if staged else (2.3, 4.5) if job.true_sequential else (2, 3))[job.corrected]
    candidates = len(CLIP_RATIOS) * job.clip * (3 if job.signed else 1)
    updates = 0.5 + 4 * job.sweeps + 2 * job.corrected  # products of a weight with a matrix like the Hessian
    factors = 3 if job.act_order == "columns" else 2
    for block in outline.blocks:
        share = {True: outline.experts_per_token / max(1, experts_of(block)), False: 1.0}
        for linear in block.linears:
            products += passes * job.tokens * share[linear.expert] * linear.in_features * linear.out_features
        for name, features in inputs_of(block):
            sums = 2 if job.corrected else 1
            products += sums * job.tokens * share[".experts." in name] * features**2 + factors * features**3
        for linear in block.quantized:
            products += updates * linear.out_features * linear.in_features**2
            tried += linear.out_features * linear.in_features * candidates
        if job.graded:  # a forward, and twice a forward and a backward pass; M; the sweeps
            products += 7 * job.graded * sum(x.out_features * x.in_features for x in block.linears)
            products += sum(job.graded * x.out_features**2 for x in block.quantized)
            for x in block.quantized:  # of a sweep one, and four with the refinement; one before the first
                products += (SWEEPS + 1) * x.out_features**2 * x.in_features
                products += (4 * SWEEPS + 1) * x.out_features * x.in_features**2
    products += tuning_products(outline, job)
    counted = products / products_per_second + tried / clip_values_per_second
    if job.beams > 1:
        counted += _search_seconds(outline, job, products_per_second, clip_values_per_second)
    return OTHER_WORK * counted if job.tokens else 0.0


def tuning_products(outline: Outline, job: Job) -> float:
    """Multiplications of the tuning of blocks: all tokens in full precision, and in each step forward and backward."""
    if job.tuned is None:
        return 0.0
    weights = sum(linear.out_features * linear.in_features for block in outline.blocks for linear in block.linears)
    return weights * (job.tokens + 3.0 * job.tuned.steps * job.tuned.step_tokens)


def _search_seconds(outline: Outline, job: Job, products_per_second: float, clip_values_per_second: float) -> float:
    """What the K-best search takes more than GPTQ."""
    columns = sum(features for block in outline.blocks for _, features in inputs_of(block))
    linears = [linear for block in outline.blocks for linear in block.quantized]
    tries = BEAM_TRIES * job.beams * sum(linear.out_features * linear.in_features for linear in linears)
    updates = 0.5 * (job.beams - 1) * sum(linear.out_features * linear.in_features**2 for linear in linears)
    return columns * BEAM_COLUMN_SECONDS + tries / clip_values_per_second + updates / products_per_second
