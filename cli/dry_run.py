"""--dry-run: what a run would make and take, from config.json alone."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_gptq.cli import options
from marlin_gptq.cli.options import context_length, show_rough_time, show_size
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import InputError
from marlin_gptq.known_gpus import KNOWN, USUAL, named
from marlin_gptq.model_directory import read_json

if TYPE_CHECKING:
    import torch

# The documents of the usual calibration texts have about this many tokens on average.
MEAN_TOKENS = 1000
TIMED_SECONDS = 0.1


@dataclass(frozen=True)
class Machine:
    """What a run is estimated for: cuda or cpu, what people call it, bytes of GPU memory, and multiplications a second.

    note  what is assumed about it, "" for nothing.
    """

    type: str
    title: str
    memory: int | None
    products: float
    note: str = ""


def machine(device: str, gpu: str | None) -> Machine:
    """That of --device and --gpu; for cuda without a GPU here it is the usual one. InputError where they contradict."""
    import torch

    if gpu is not None and device == "cpu":
        raise InputError(f"--gpu: got {gpu} beside --device cpu; leave one of the two out")
    if gpu is not None or (device == "cuda" and not torch.cuda.is_available()):
        known = KNOWN[gpu or USUAL]
        others = ", ".join(name for name in KNOWN if name != USUAL)
        note = "" if gpu else f"there is no GPU here: estimated for one {known.title}; --gpu names another ({others})"
        return Machine("cuda", known.title, known.memory, known.products, note)
    where = options.torch_device(device)
    if where.type == "cpu":
        return Machine("cpu", "CPU", None, _products(where))
    from marlin_gptq.device_memory import free_bytes

    return Machine("cuda", torch.cuda.get_device_name(where), free_bytes(where), _products(where))


def estimate(
    model_dir: Path,
    config: QuantizationConfig,
    *,
    dtype: str,
    on: Machine,
    n_samples: int,
    seq_len: int | None,
    shard_size: int,
    spill: str | None,
    limit: int | None,
    kept: bool = False,
    processes: int = 1,
) -> dict[str, Any]:
    """Plain JSON: tensors of the result, bytes, seconds, and the plan. Host memory includes what this process holds.

    Memory and seconds are those of the pass over the blocks; "tuning", null without one, is what comes after it.
    "tuned_blocks_least_gpu_bytes", null without that tuning, must be free: with it a run makes do, more slowly.

    Where it is to run on a CPU, GPU memory is estimated all the same. InputError where the model cannot be quantized as
    asked, or not within the limit.
    """
    from marlin_gptq.calibration import sequence_length
    from marlin_gptq.estimated_size import stored_tensors
    from marlin_gptq.estimated_time import seconds
    from marlin_gptq.estimates import SIDE_BY_SIDE, memory, memory_on_cpu
    from marlin_gptq.job import Job, Plan
    from marlin_gptq.memory_plan import plan_within, tuning_needs, usual_plan
    from marlin_gptq.modeling.architecture import read_config
    from marlin_gptq.modeling.outline import outline
    from marlin_gptq.overrides import require_matches
    from marlin_gptq.requirements import require_combination, require_head
    from marlin_gptq.tuning.text import PACKED_BATCH, WINDOW

    made = outline(model_dir, config)
    require_matches(config, *made.names)
    experts = any(linear.expert for block in made.blocks for linear in block.linears)
    require_head(config, read_config(model_dir))
    require_combination(config, kept=kept, processes=processes, limited=limit is not None, experts=experts)
    longest = sequence_length(seq_len, context_length(model_dir)) if n_samples else 0
    tokens = n_samples * min(longest, MEAN_TOKENS)
    if config.pack and tokens:
        longest = min(tokens, PACKED_BATCH * min(WINDOW, longest))
    stored = dtype if dtype != "auto" else _stored_dtype(model_dir)
    tensors = [
        {"name": name, "type": kind, "shape": list(shape), "bytes": size}
        for name, kind, shape, size in stored_tensors(made, stored)
    ]

    def job(compute_bytes: int) -> Job:
        return Job.of(config, tokens, longest, compute_bytes, shard_size)

    place = "device" if spill in (None, "none") else spill
    plan = Plan(place, side_by_side=SIDE_BY_SIDE, staged=config.true_sequential and place == "device")
    if limit is not None:
        plan = plan_within(made, job(2), limit, spill)
    elif on.memory is not None:
        plan = usual_plan(made, job(2), on.memory, spill)
    gpu = memory(made, job(2), plan)
    here = resident_bytes()
    cpu_plan = Plan("disk" if spill == "disk" else "device", staged=config.true_sequential and spill != "disk")
    on_cpu = memory_on_cpu(made, job(4), cpu_plan)
    cuda = on.type == "cuda"
    return {
        "tensors": tensors,
        "output_bytes": sum(entry["bytes"] for entry in tensors),
        "calibration_tokens": tokens,
        "longest_sample": longest,
        "device": on.type,
        "machine": on.title,
        "gpu_bytes": on.memory,
        "peak_gpu_bytes": gpu.device,
        "peak_gpu_phase": gpu.phase,
        "peak_host_bytes": here + (2 * gpu.host if cuda else on_cpu),
        "host_bytes_now": here,
        "seconds": seconds(made, job(2 if cuda else 4), on.products, staged=(plan if cuda else cpu_plan).staged),
        "tuned_blocks_least_gpu_bytes": tuning_needs(made, job(2), Plan("host", tuned_tokens=0)) or None,
        "tuning": _tuning(model_dir, config) if config.tunes else None,
        "plan": {
            "place": plan.place,
            "hessian_bytes": plan.hessian_bytes,
            "rows": plan.rows,
            "pack_tokens": plan.pack_tokens,
            "staged": plan.staged,
        },
    }


def shown(found: dict[str, Any]) -> str:
    """The estimate for people: tensors that differ by their block or expert only share a line."""
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for entry in found["tensors"]:
        name = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", entry["name"]))
        kinds.setdefault((name, str(entry["shape"]), entry["type"]), []).append(entry["bytes"])
    width = max(len(name) for name, _, _ in kinds)
    lines = [
        f"{name:{width}}  {shape:18} {kind:16} {len(sizes):5} x {show_size(sizes[0])}"
        for (name, shape, kind), sizes in kinds.items()
    ]
    plan, cuda = found["plan"], found["device"] == "cuda"
    taken = round(found["host_bytes_now"], -8)  # the last digits change from call to call, and say nothing
    host = found["peak_host_bytes"] - found["host_bytes_now"] + taken
    lines += [
        "",
        f"result       {show_size(found['output_bytes'])} in {len(found['tensors'])} tensors",
        f"calibration  {found['calibration_tokens']} tokens (documents of {MEAN_TOKENS} on average), the longest "
        f"{found['longest_sample']}",
        f"GPU memory   {show_size(found['peak_gpu_bytes'])}, at its peak in the {found['peak_gpu_phase']} phase"
        + (_beside(found) if cuda else " (if it ran on a GPU)"),
        f"host memory  {show_size(host)}, {show_size(taken)} of it taken already",
        f"time         about {show_rough_time(found['seconds'])} on {'one' if cuda else 'this'} {found['machine']}, "
        "loading and saving aside",
        f"plan         activations in {plan['place']} memory"
        + (f", {plan['rows']} rows at once" if plan["rows"] else "")
        + (", Hessians in several passes" if plan["hessian_bytes"] else ""),
    ]
    least = found["tuned_blocks_least_gpu_bytes"]
    if least is not None:
        lines.append(f"tuned blocks {show_size(least)} of free GPU memory at least, with one sample at a time")
    tuning = found["tuning"]
    if tuning is not None:
        least, most = (show_size(tuning[f"{which}_gpu_bytes"]) for which in ("least", "most"))
        lines += [
            "             (memory, time and plan are those of the pass over the blocks, without the tuning)",
            f"tuning       {tuning['steps']} steps of {tuning['batch']} windows, on a GPU with {least} at least, up to "
            f"{most} if they are free; its time is not estimated",
        ]
    return "\n".join(lines)


def _beside(found: dict[str, Any]) -> str:
    """How the peak stands to the memory of the GPU."""
    if found["peak_gpu_bytes"] <= found["gpu_bytes"]:
        return f" (of {show_size(found['gpu_bytes'])})"
    return f": more than the {show_size(found['gpu_bytes'])} of it, give --max-gpu-memory to make do with less"


def _tuning(model_dir: Path, config: QuantizationConfig) -> dict[str, int]:
    from marlin_gptq.requirements import tuned_sizes
    from marlin_gptq.tuning.memory import needed_bytes
    from marlin_gptq.tuning.text import WINDOW

    least, most = needed_bytes(
        tuned_sizes(model_dir, config), batch=config.tune_batch, length=WINDOW, tune_codes=config.tune_codes
    )
    return {
        "steps": config.tune_steps,
        "batch": config.tune_batch,
        "least_gpu_bytes": least,
        "most_gpu_bytes": most,
    }


def expected_seconds(
    model_dir: Path, config: QuantizationConfig, samples: list[Any], device: torch.device, processes: int
) -> list[float]:
    """Rough seconds of each block of a run on this device; nothing for rounding, which takes hardly any."""
    from marlin_gptq.estimated_time import block_seconds
    from marlin_gptq.job import Job
    from marlin_gptq.modeling.outline import outline

    if not samples:
        return []
    sizes, cuda = [sample.numel() for sample in samples], device.type == "cuda"
    job = Job.of(config, sum(sizes), max(sizes), 2 if cuda else 4, 0)
    found = block_seconds(outline(model_dir, config), job, _products(device), staged=config.true_sequential)
    return [seconds / processes for seconds in found]


def _products(device: torch.device) -> float:
    """Of a GPU that is known by its name what the table says, else measured."""
    import torch

    known = named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.products if known else products_per_second(device)


def products_per_second(device: torch.device) -> float:
    """Multiplications that this device does in a second in a large matrix product: about, and the same at each call.

    The quickest of many short products is what the device can do, whatever else it does meanwhile: on a CPU of one
    thread, times their number. Of that only the power of two below counts, and stands for all up to the next.
    """
    import torch

    cuda = device.type == "cuda"
    size, dtype = (4096, torch.bfloat16) if cuda else (256, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best, until = math.inf, time.perf_counter() + TIMED_SECONDS
    try:
        while time.perf_counter() < until:
            started = time.perf_counter()
            float((matrix @ matrix)[0, 0])
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 ** (math.floor(math.log2(size**3 / best / 1e9)) + 0.5) * 1e9 * (1 if cuda else threads)


def resident_bytes() -> int:
    """Host memory of this process now; 0 where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _stored_dtype(model_dir: Path) -> str:
    config = read_json(model_dir / "config.json")
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in ("float16", "bfloat16") else "float16"
