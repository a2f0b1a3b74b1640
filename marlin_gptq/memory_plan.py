"""What a run gives up so that it keeps within the memory it may take."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.estimates import SIDE_BY_SIDE, activation_bytes, memory, staged_bytes, tuning_memory
from marlin_gptq.job import Job, Plan
from marlin_gptq.modeling.outline import Outline
from marlin_gptq.modeling.packed import PACK_TOKENS
from marlin_gptq.tuning.block_memory import FEWER_TOKENS, TUNED_TOKENS
from marlin_gptq.tuning.memory import SHARE


def plan_within(outline: Outline, job: Job, limit: int, spill: str | None = None, begun: int | None = None) -> Plan:
    """The least frugal plan whose device memory stays within `limit` bytes.

    spill  "none" keeps activations on the device, "host" and "disk" put them there, None decides.
    begun  `tuned_tokens` of the run that is gone on with, which must stay.
    Gives up speed in this order: true-sequential calibration begins at a block's start each time instead of going on in
    stages; activations wait in host memory; weights are solved in pieces of rows; Hessians are summed in several
    passes; each step is tried with packs of samples, then with one sample at a time; blocks are tuned with fewer
    samples together. InputError with the least that would do, if nothing fits.
    """
    places = {"none": ["device"], "host": ["host"], "disk": ["disk"], None: ["device", "host"]}[spill]
    largest = max((x.in_features for block in outline.blocks for x in block.quantized), default=0) ** 2 * 4
    plans = [Plan(place) for place in places]
    frugal = plans[-1]
    if job.true_sequential and plans[0].place == "device":
        plans.insert(0, replace(plans[0], staged=True))
    plans += [replace(frugal, rows=rows) for rows in (8192, 2048)]
    plans += [
        replace(frugal, rows=rows, hessian_bytes=size) for rows, size in ((2048, 2 * largest), (2048, 1), (512, 1))
    ]
    plans = [replace(plan, pack_tokens=tokens) for plan in plans for tokens in (PACK_TOKENS, 0)]
    tuned = ((TUNED_TOKENS, *FEWER_TOKENS) if job.tuned else (TUNED_TOKENS,)) if begun is None else (begun,)
    plans = [replace(plan, tuned_tokens=tokens) for tokens in tuned for plan in plans]
    for plan in plans:
        if max(memory(outline, job, plan).device, tuning_needs(outline, job, plan)) <= limit:
            return plan
    least = memory(outline, job, plans[-1])
    where = (
        f"the {least.phase} phase of block {least.block}" if least.phase not in ("embed", "head") else "the embedding"
    )
    ways = ["a smaller --seq-len"] if least.phase == "forward" else []
    needed, tuning = least.device, tuning_needs(outline, job, plans[-1])
    if tuning > needed:
        where, needed, ways = "the tuning of a block", tuning, ["--tune-block-steps 0"]
    ways += ["--spill host"] if spill == "none" else []
    raise InputError(
        f"--max-gpu-memory: got {limit / 1e9:.2f} GB, but {where} needs {needed / 1e9:.2f} GB at least; give as "
        f"much{''.join(f', or {way}' for way in ways)}"
    )


def usual_plan(outline: Outline, job: Job, free: int, spill: str | None) -> Plan:
    """What a run does that is given no limit, with `free` bytes of the device; `spill` as for `plan_within`.

    Activations wait on the device unless they take half of it, and so do those of a block solved in stages.
    """
    waiting, inside = activation_bytes(outline, job), staged_bytes(outline, job) if job.true_sequential else 0
    place = {None: "device" if waiting < free / 2 else "host", "none": "device"}.get(spill, spill or "device")
    staged = job.true_sequential and place == "device" and waiting + inside < free / 2
    return Plan(place, side_by_side=min(SIDE_BY_SIDE, free // 8), staged=staged)


def tuning_within(
    outline: Outline, job: Job, plan: Plan, free: int, spill: str | None = None, begun: int | None = None
) -> Plan:
    """`plan`, changed as little as it takes for the tuning of each block to fit `free` bytes of the device.

    spill  as for `plan_within`.
    begun  `tuned_tokens` of the run that is gone on with, which must stay: they change the rounding of sums.
    Gives up in this order: activations wait in host memory; fewer samples pass a block together, at last one at a time.
    QuantizationError with the least that would do, if nothing fits.
    """
    if job.tuned is None:
        return plan
    plans = [plan if begun is None else replace(plan, tuned_tokens=begun)]
    if spill is None and plan.place == "device":
        plans.append(replace(plans[0], place="host", staged=False))
    if begun is None:
        plans += [replace(plans[-1], tuned_tokens=tokens) for tokens in FEWER_TOKENS]
    for tried in plans:
        if tuning_needs(outline, job, tried) <= free:
            return tried
    needed = tuning_needs(outline, job, plans[-1])
    ways = ["a shorter --seq-len"] if begun is None and job.longest > 1 else []
    ways += ["--no-tune-codes (scales and norm weights only)"] if begun is None and job.tuned.moving else []
    ways += ["--spill host"] if begun is None and spill == "none" else []
    ways += ["--tune-block-steps 0"] if begun is None else ["a GPU with as much free memory as it was begun with"]
    raise QuantizationError(
        f"tuning block by block needs about {needed / 1e9:.1f} GB of free memory on the device and "
        f"{free / 1e9:.1f} GB are free; use {', '.join(ways[:-1])}{' or ' if ways[:-1] else ''}{ways[-1]}"
    )


def tuning_needs(outline: Outline, job: Job, plan: Plan) -> int:
    """Bytes of the device that must be free for the tuning of blocks: allocators leave gaps. 0 without that tuning."""
    return ceil(tuning_memory(outline, job, plan) / SHARE)
