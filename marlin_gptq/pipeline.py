"""The whole story: a checkpoint and calibration samples in, a quantized checkpoint out, block by block (block_run.py).

embed all samples
if the recipe says so, take the gradients of the loss by every block's outputs (modeling/output_gradients.py)
for each decoder block, alone on the device:
    run the samples through it and sum the Hessian of each distinct input of its linears
    quantize the linears, tune them if the recipe says so (tuning/block.py), pack them, write them
    run the samples through the quantized block: the inputs of the next one
then, if the recipe says so, the whole model is tuned end to end (tuning/stage.py)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.block_run import BlockRun
from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Cost, Costs
from marlin_gptq.device_memory import free_bytes
from marlin_gptq.disk import require_space
from marlin_gptq.distributed import Team
from marlin_gptq.errors import InputError
from marlin_gptq.job import Job, Plan
from marlin_gptq.memory_plan import plan_within, tuning_within, usual_plan
from marlin_gptq.modeling.architecture import context_length, read_config, require_full_precision
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.outline import outline
from marlin_gptq.modeling.output_gradients import chosen_samples
from marlin_gptq.output_directory import write_companions
from marlin_gptq.placement import Placement, parent_of
from marlin_gptq.quantization.loops import PLAIN, inner_loops
from marlin_gptq.quantization.weight import columns_per_group
from marlin_gptq.report import ProgressEvent, QuantizeReport
from marlin_gptq.requirements import (
    carried_tensors,
    has_experts,
    left_in_16_bits,
    linears_of,
    output_bytes,
    require_combination,
    require_head,
    require_quantizable,
    result_dtype,
)
from marlin_gptq.tuning.stage import tune_checkpoint
from marlin_gptq.tuning.text import packed
from marlin_gptq.work_directory import WorkDirectory, model_digest

logger = logging.getLogger(__name__)

ALONE = Team()
# What the work directory calls `Plan.tuned_tokens`, on which the bits of tuned blocks depend.
TOGETHER = "tokens tuned together"


def quantize_model(
    model_dir: Path,
    output: Path,
    config: QuantizationConfig,
    samples: list[Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    shard_size: int = 10**9,
    overwrite: bool = False,
    base_model: str | None = None,
    calibration: dict[str, Any] | None = None,
    progress: Callable[[ProgressEvent], None] | None = None,
    work: WorkDirectory | None = None,
    spill: str | None = None,
    max_gpu_memory: int | None = None,
    team: Team = ALONE,
    before: Mapping[str, float] | None = None,
) -> QuantizeReport:
    """Quantize the decoder linears of `model_dir` into the new directory `output`.

    samples   token ids, int64 [T] each, of their natural lengths; may be empty for method rtn.
    dtype     float16 or bfloat16 of the result; None keeps the checkpoint's (float32 becomes float16).
    base_model  what the log and the model card call the source; by default the name of its directory.
    shard_size, in bytes, is also the most output that waits in host memory.
    work        keeps every finished block; of a resumed run, gives those back that are there. The output is then
                bit-identical to that of a run in one piece, but for the times in its log and card.
    spill       where activations wait between two blocks: "none" (on the device), "host" or "disk"; None decides.
    max_gpu_memory  bytes that the run may take on the GPU; memory_plan.py says what it gives up for that.
    before      seconds of what the caller did before, by stage: they stand first among the costs in the report.
    team        the processes that work on it together, each calling this with the same arguments (`work`, `progress`
                and what is written are the first one's). Equal to one process but for the order of sums.

    Nothing appears under `output` before everything is written; an existing `output` is replaced with `overwrite` only,
    and only if it is a model directory (destination.py). Raises InputError, CheckpointError or
    QuantizationError, each naming what is wrong; an interrupted run leaves nothing behind.
    """
    started = time.perf_counter()
    if config.method == "gptq" and not samples:
        raise InputError("samples: got none, GPTQ needs calibration text; use method rtn to round without it")
    require_full_precision(model_dir, read_config(model_dir))
    require_head(config, read_config(model_dir))
    if config.tunes:
        require_quantizable(
            model_dir, output, config, dtype,
            device=device, kept=work is not None, processes=team.size, limited=max_gpu_memory is not None,
        )  # fmt: skip
        with Placement(output, overwrite=overwrite, inputs={"the model": model_dir}) as place:
            first = quantize_model(
                model_dir, place.aside(), replace(config, tune_steps=0), samples,
                device=device, dtype=dtype, shard_size=shard_size, base_model=base_model, calibration=calibration,
                progress=progress, spill=spill, before=before,
            )  # fmt: skip
            return tune_checkpoint(
                model_dir, first.output, output, first, config, samples,
                device=device, shard_size=shard_size, overwrite=overwrite, progress=progress, place=place,
            )  # fmt: skip
    costs = Costs(device)
    target = result_dtype(model_dir, dtype)
    stream = BlockStream(model_dir, device=device, dtype=target if device.type == "cuda" else torch.float32)
    linears = linears_of(stream, config)
    limited = max_gpu_memory is not None
    require_combination(
        config, kept=work is not None, processes=team.size, limited=limited, experts=has_experts(stream)
    )
    carried = carried_tensors(stream, linears)
    if carried and team.leads:
        logger.warning(
            "%d tensors that the architecture has no place for are kept as they are (%s)", len(carried), carried[0]
        )
    size = output_bytes(stream, linears, config, target)
    require_space(output, size)
    passing = samples if config.method == "gptq" else []
    if passing and config.pack:
        passing = packed(samples, context_length(stream.config))
    numbers = _own_samples(passing, team)
    own = [passing[number] for number in numbers]
    job = job_of(own, config, stream.dtype, shard_size)
    begun = None if work is None else work.fact(TOGETHER)
    plan = team.from_leader(_plan(model_dir, config, job, device, spill, max_gpu_memory, begun))
    with costs.measure("try inner loops"):
        loops = _loops(linears, config, target, device, team)
    if work is not None:
        work.require_space(size, output)
        shared: dict[str, Any] = {"rows at once": plan.rows, "packs of tokens": plan.pack_tokens}
        shared |= {"processes": team.size, "inner loops": loops}
        shared |= {TOGETHER: plan.tuned_tokens} if config.tunes_blocks else {}
        work.begin(_facts(model_dir, config, target, shard_size, device) | shared, samples)
    disk = work.directory if work else parent_of(output)
    run = BlockRun(stream, config, target, sum(map(len, linears)), progress, plan, disk, team, costs, work=work)
    inputs = {"the model": model_dir} | ({"the work directory": work.directory} if work else {})
    writing = None
    if team.leads:  # only the first process writes
        writing = CheckpointWriter(output, shard_size=shard_size, overwrite=overwrite, inputs=inputs)
    with writing or nullcontext() as writer, closing(stream):
        costs.rest("open", started)
        stream.read_ahead(0)
        with costs.measure("embed"):
            hidden = run.embed(own)
            if config.method == "gptq" and (config.correct_target or config.tunes_blocks):
                run.full = run.copied(hidden)
        if config.two_sided and config.method == "gptq":
            with costs.measure("gradients"):
                chosen = set(chosen_samples([sample.numel() for sample in passing]))
                run.take_gradients(hidden, {place: n for place, n in enumerate(numbers) if n in chosen})
            stream.read_ahead(0)
        if writer is not None:
            with costs.measure("write"):
                run.copy_outer(writer)
                for name in carried:
                    writer.add(name, stream.store.get(name))
        for index, names in enumerate(linears):
            tensors = run.block(index, list(names), hidden)
            if writer is not None:
                with costs.measure("write"):
                    for name, tensor in tensors.items():
                        writer.add(stream.weights.file_name(name), tensor)
        run.report("write", stream.n_blocks - 1, None, None)
        if writer is not None:
            with costs.measure("write"):
                writer.drain()
        share, left = left_in_16_bits(stream, linears, config)
        seconds = costs.rest("other", started)
        report = QuantizeReport(
            output=output,
            base_model=base_model or model_dir.resolve().name,
            config=config,
            calibration=calibration or {},
            device=str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
            dtype=str(target).removeprefix("torch."),
            seconds=seconds,
            bytes_before=sum(map(stream.store.size, stream.store.names)),
            bytes_after=size,
            peak_gpu_bytes=costs.peak_gpu_bytes(),
            unknown_tensors=carried,
            costs={name: Cost(seconds=s, peak_gpu_bytes=None) for name, s in (before or {}).items()} | costs.by_name,
            records=run.records,
            tuned_blocks=run.tuned,
            inner_loops=loops,
            quantized_share=share,
            left=left,
        )
        if writer is not None:
            write_companions(writer, model_dir, report)
            writer.finish(work.finishing if work else None)
        team.from_leader(None)  # nobody leaves before the output is there
    return report


def _own_samples(samples: list[Tensor], team: Team) -> list[int]:
    """The numbers of this process's share, of about as many tokens as the others'; InputError if there are too few."""
    if samples and len(samples) < team.size:
        raise InputError(
            f"samples: got {len(samples)} for {team.size} processes; give at least one for each, or use fewer processes"
        )
    return team.mine(list(range(len(samples))), [float(sample.numel()) for sample in samples])


def job_of(samples: list[Tensor], config: QuantizationConfig, dtype: torch.dtype, shard_size: int) -> Job:
    """The run over these samples, for estimates of it."""
    sizes = [sample.numel() for sample in samples]
    return Job.of(config, sum(sizes), max(sizes, default=0), dtype.itemsize, shard_size)


def _plan(
    model_dir: Path,
    config: QuantizationConfig,
    job: Job,
    device: torch.device,
    spill: str | None,
    limit: int | None,
    begun: int | None = None,
) -> Plan:
    """How the run keeps within its memory; with a limit, torch is told never to take more.

    begun  tokens tuned together in the run that is gone on with.
    QuantizationError if the tuning of blocks does not fit the GPU.
    """
    if device.type != "cuda":
        if limit is not None:
            raise InputError("--max-gpu-memory: this run computes on the CPU; leave it out, or use --device cuda")
        return Plan("disk" if spill == "disk" else "device", staged=job.true_sequential and spill != "disk")
    if limit is not None:
        plan = plan_within(outline(model_dir, config), job, limit, spill, begun)
        total = torch.cuda.get_device_properties(device).total_memory
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), number)
        return plan
    free = free_bytes(device)
    plan = usual_plan(outline(model_dir, config), job, free, spill)
    if not config.tunes_blocks:
        return plan
    return tuning_within(outline(model_dir, config), job, plan, free, spill, begun)


def _facts(
    model_dir: Path, config: QuantizationConfig, target: torch.dtype, shard_size: int, device: torch.device
) -> dict[str, Any]:
    """What the bits of the result depend on, beside the samples: a run is resumed with the same or not at all."""
    return {
        "model": model_digest(model_dir),
        "settings": config.to_dict() | {"preset": config.preset},
        "dtype": str(target).removeprefix("torch."),
        "shard_size": shard_size,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        **{name: version(name) for name in ("torch", "transformers", "marlin-gptq")},
    }


def _loops(
    linears: list[dict[str, nn.Linear]],
    config: QuantizationConfig,
    target: torch.dtype,
    device: torch.device,
    team: Team,
) -> str:
    """What GPTQ's inner loops will run in for these linears; where that is Triton, tried out now and not halfway."""
    if config.method != "gptq":
        return PLAIN.name
    shapes = {(linear.in_features, config.group_size_of(name)) for block in linears for name, linear in block.items()}
    kinds = {(columns_per_group(*shape), min(config.block_size, shape[0])) for shape in shapes}
    for kind in kinds:  # one that fails turns all off, those that were tried before it too
        inner_loops(device, *kind, target)
    own = {inner_loops(device, *kind, target).name for kind in kinds}
    return ", ".join(sorted(set().union(*(team.object_from(process, own) for process in range(team.size)))))
