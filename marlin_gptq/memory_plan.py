"""What a run gives up so that it keeps within the memory it may take."""

from __future__ import annotations

from dataclasses import replace

from marlin_gptq.errors import InputError
from marlin_gptq.estimates import Job, Plan, memory
from marlin_gptq.modeling.outline import Outline
from marlin_gptq.modeling.packed import PACK_TOKENS


def plan_within(outline: Outline, job: Job, limit: int, spill: str | None = None) -> Plan:
    """The least frugal plan whose device memory stays within `limit` bytes.

    spill  "none" keeps activations on the device, "host" and "disk" put them there, None decides.
    Gives up speed in this order: activations wait in host memory; weights are solved in pieces of rows; Hessians are
    summed in several passes; each step is tried with packs of samples, then with one sample at a time. InputError with
    the least that would do, if nothing fits.
    """
    places = {"none": ["device"], "host": ["host"], "disk": ["disk"], None: ["device", "host"]}[spill]
    largest = max((x.in_features for block in outline.blocks for x in block.quantized), default=0) ** 2 * 4
    plans = [Plan(place) for place in places]
    frugal = plans[-1]
    plans += [replace(frugal, rows=rows) for rows in (8192, 2048)]
    plans += [
        replace(frugal, rows=rows, hessian_bytes=size) for rows, size in ((2048, 2 * largest), (2048, 1), (512, 1))
    ]
    plans = [replace(plan, pack_tokens=tokens) for plan in plans for tokens in (PACK_TOKENS, 0)]
    for plan in plans:
        if memory(outline, job, plan).device <= limit:
            return plan
    least = memory(outline, job, plans[-1])
    where = f"the {least.phase} phase of block {least.block}" if least.phase != "embed" else "the embedding"
    ways = ["a smaller --seq-len"] if least.phase == "forward" else []
    ways += ["--spill host"] if spill == "none" else []
    raise InputError(
        f"--max-gpu-memory: got {limit / 1e9:.2f} GB, but {where} needs {least.device / 1e9:.2f} GB at least; give as "
        f"much{''.join(f', or {way}' for way in ways)}"
    )
