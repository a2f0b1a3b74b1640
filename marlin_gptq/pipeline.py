"""The whole story in one file: a checkpoint and calibration samples in, a quantized checkpoint out, block by block.

embed all samples
for each decoder block, alone on the device:
    run the samples through it and sum the Hessian of each distinct input of its linears
    quantize the linears, pack them, write them
    run the samples through the quantized block: the inputs of the next one
then, if the recipe says so, the whole model is tuned end to end (tuning/stage.py)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.checkpoint import CheckpointWriter, require_space, staging_directory
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.distributed import Team, share_out
from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.estimates import Job, Plan, hessian_passes, plan_within
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.architecture import read_config, require_finite, require_full_precision
from marlin_gptq.modeling.blocks import BlockStream, return_free_memory
from marlin_gptq.modeling.install import install_block
from marlin_gptq.modeling.linear import pack
from marlin_gptq.modeling.observe import Calibrated, Groups, collect_cross, collect_hessians, full_precision, stages
from marlin_gptq.modeling.outline import outline
from marlin_gptq.output_directory import write_companions
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.hessian import Cross, NotPositiveDefinite, relative_error
from marlin_gptq.quantization.solve import Prepared, prepare, solve
from marlin_gptq.quantization.weight import QuantizedWeight, columns_per_group
from marlin_gptq.report import LinearRecord, ProgressEvent, QuantizeReport, linear_record
from marlin_gptq.requirements import (
    has_experts,
    linears_of,
    output_bytes,
    require_combination,
    require_quantizable,
    result_dtype,
)
from marlin_gptq.tuning.stage import tune_checkpoint
from marlin_gptq.tuning.text import packed
from marlin_gptq.work_directory import WorkDirectory, model_digest

logger = logging.getLogger(__name__)

ALONE = Team()


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
) -> QuantizeReport:
    """Quantize the decoder linears of `model_dir` into the new directory `output`.

    samples   token ids, int64 [T] each, of their natural lengths; may be empty for method rtn.
    dtype     float16 or bfloat16 of the result; None keeps the checkpoint's (float32 becomes float16).
    base_model  what the log and the model card call the source; by default the name of its directory.
    shard_size, in bytes, is also the most output that waits in host memory.
    work        keeps every finished block; of a resumed run, gives those back that are there. The output is then
                bit-identical to that of a run in one piece, but for the times in its log and card.
    spill       where activations wait between two blocks: "none" (on the device), "host" or "disk"; None decides.
    max_gpu_memory  bytes that the run may take on the GPU; what it gives up for that stands in estimates.plan_within.
    team        the processes that work on it together, each calling this with the same arguments (`work`, `progress`
                and what is written are the first one's). Equal to one process but for the order of sums.

    Nothing appears under `output` before everything is written. Raises InputError, CheckpointError or
    QuantizationError, each naming what is wrong; an interrupted run leaves nothing behind.
    """
    started = time.perf_counter()
    if config.method == "gptq" and not samples:
        raise InputError("samples: got none, GPTQ needs calibration text; use method rtn to round without it")
    require_full_precision(model_dir, read_config(model_dir))
    if config.tunes:
        require_quantizable(
            model_dir, output, config, dtype,
            device=device, kept=work is not None, processes=team.size, limited=max_gpu_memory is not None,
        )  # fmt: skip
        with staging_directory(output, overwrite) as staging:
            first = quantize_model(
                model_dir, staging / output.name, replace(config, tune_steps=0), samples,
                device=device, dtype=dtype, shard_size=shard_size, base_model=base_model, calibration=calibration,
                progress=progress, spill=spill,
            )  # fmt: skip
            return tune_checkpoint(
                model_dir, first.output, output, first, config, samples,
                device=device, shard_size=shard_size, overwrite=overwrite, progress=progress,
            )  # fmt: skip
    target = result_dtype(model_dir, dtype)
    stream = BlockStream(model_dir, device=device, dtype=target if device.type == "cuda" else torch.float32)
    linears = linears_of(stream, config)
    limited = max_gpu_memory is not None
    require_combination(
        config, kept=work is not None, processes=team.size, limited=limited, experts=has_experts(stream)
    )
    size = output_bytes(stream, linears, config, target)
    require_space(output, size)
    passing = samples if config.method == "gptq" else []
    if passing and config.pack:
        passing = packed(samples, getattr(stream.config, "max_position_embeddings", None))
    own = _own_samples(passing, team)
    job = job_of(own, config, stream.dtype, shard_size)
    plan = team.from_leader(_plan(model_dir, config, job, device, spill, max_gpu_memory))
    if work is not None:
        work.require_space(size, output)
        shared = {"rows at once": plan.rows, "processes": team.size}
        work.begin(_facts(model_dir, config, target, shard_size, device) | shared, samples)
    disk = work.directory if work else output.absolute().parent
    run = _Run(stream, config, target, sum(map(len, linears)), progress, work, plan, disk, team, Costs(device))
    name = work.id if work else None
    # Only the first process writes.
    writing = CheckpointWriter(output, shard_size=shard_size, overwrite=overwrite, run=name) if team.leads else None
    with writing or nullcontext() as writer:
        hidden = run.embed(own)
        if config.correct_target and config.method == "gptq":
            run.full = run.copied(hidden)
        if writer is not None:
            run.copy_outer(writer)
        for index, names in enumerate(linears):
            tensors = run.block(index, list(names), hidden)
            if writer is not None:
                for name, tensor in tensors.items():
                    writer.add(stream.file_name(name), tensor)
        run.report("write", stream.n_blocks - 1, None, None)
        unknown = stream.unknown_tensors()
        if unknown and team.leads:
            logger.warning(
                "%d tensors that the architecture has no place for were left out (%s)",
                len(unknown),
                unknown[0],
            )
        report = QuantizeReport(
            output=output,
            base_model=base_model or model_dir.resolve().name,
            config=config,
            calibration=calibration or {},
            device=str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
            dtype=str(target).removeprefix("torch."),
            seconds=time.perf_counter() - started,
            bytes_before=sum(stream.store.size(name) for name in stream.store.names if name not in set(unknown)),
            bytes_after=size,
            peak_gpu_bytes=run.costs.peak_gpu_bytes(),
            unknown_tensors=unknown,
            costs=run.costs.by_name,
            records=run.records,
        )
        if writer is not None:
            write_companions(writer, model_dir, report)
            writer.finish(work.finishing if work else None)
        team.from_leader(None)  # nobody leaves before the output is there
    return report


def _own_samples(samples: list[Tensor], team: Team) -> list[Tensor]:
    """This process's share, of about as many tokens as the others'; InputError if there are too few for all."""
    if samples and len(samples) < team.size:
        raise InputError(
            f"samples: got {len(samples)} for {team.size} processes; give at least one for each, or use fewer processes"
        )
    return team.mine(samples, [float(sample.numel()) for sample in samples])


def job_of(samples: list[Tensor], config: QuantizationConfig, dtype: torch.dtype, shard_size: int) -> Job:
    """The run over these samples, for estimates of it."""
    sizes = [sample.numel() for sample in samples]
    return Job.of(config, sum(sizes), max(sizes, default=0), dtype.itemsize, shard_size)


def _plan(
    model_dir: Path, config: QuantizationConfig, job: Job, device: torch.device, spill: str | None, limit: int | None
) -> Plan:
    """How the run keeps within its memory; with a limit, torch is told never to take more."""
    if device.type != "cuda":
        if limit is not None:
            raise InputError("--max-gpu-memory: this run computes on the CPU; leave it out, or use --device cuda")
        return Plan("disk" if spill == "disk" else "device")
    if limit is not None:
        plan = plan_within(outline(model_dir, config), job, limit, spill)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        return plan
    if spill is not None:
        return Plan({"none": "device"}.get(spill, spill))
    free, _ = torch.cuda.mem_get_info(device)
    hidden = read_config(model_dir).hidden_size
    return Plan("device" if job.tokens * hidden * job.compute_bytes < free / 2 else "host")


def _facts(
    model_dir: Path, config: QuantizationConfig, target: torch.dtype, shard_size: int, device: torch.device
) -> dict[str, Any]:
    """What the bits of the result depend on, beside the samples: a run is resumed with the same or not at all."""
    return {
        "model": model_digest(model_dir),
        "settings": config.to_dict(),
        "dtype": str(target).removeprefix("torch."),
        "shard_size": shard_size,
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        **{name: version(name) for name in ("torch", "transformers", "marlin-gptq")},
    }


@dataclass
class _Run:
    """What every step of one quantization shares."""

    stream: BlockStream
    config: QuantizationConfig
    target: torch.dtype
    total: int
    progress: Callable[[ProgressEvent], None] | None
    work: WorkDirectory | None
    plan: Plan
    disk: Path
    team: Team
    costs: Costs
    records: list[LinearRecord] = field(default_factory=list)
    quantized: list[tuple[nn.Linear, QuantizedWeight]] = field(default_factory=list)
    solved: int = 0
    # For correct_target only: the samples after full-precision blocks, and a pass's sums against those that arrive.
    full: Activations | None = None
    crosses: dict[str, Cross] = field(default_factory=dict)

    def report(self, stage: str, block: int, linear: str | None, error: float | None) -> None:
        if self.progress is not None:
            done = min(self.total, len(self.records) + self.solved * self.team.size)
            self.progress(ProgressEvent(stage, block, self.stream.n_blocks, linear, done, self.total, error))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Floats in the dtype of the result; QuantizationError where they overflow it."""
        if not tensor.is_floating_point():
            return tensor
        require_finite(name, tensor, "the checkpoint is damaged")
        cast = tensor.to(self.target)
        require_finite(name, cast, f"they overflow {self.target}; use --dtype bfloat16")
        return cast

    def embed(self, samples: list[Tensor]) -> Activations:
        """Block 0's inputs, [B, T, hidden] each (B is 1 for documents), where the plan keeps them."""
        vocabulary = self.stream.config.vocab_size
        hidden = self._activations([(sample.numel() // sample.shape[-1], sample.shape[-1]) for sample in samples])
        for position, sample in enumerate(samples):
            if int(sample.max()) >= vocabulary or int(sample.min()) < 0:
                raise InputError(
                    f"token {int(sample.max())} is outside the model's vocabulary of {vocabulary}: the tokenizer "
                    "does not belong to this model"
                )
            hidden.put(position, self.stream.embed(sample.reshape(-1, sample.shape[-1])))
        self.stream.release()
        return_free_memory()
        return hidden

    def copied(self, hidden: Activations) -> Activations:
        """The same activations once more, in the same kind of place."""
        copy = self._activations(hidden.shapes)
        for position, inputs in enumerate(hidden):
            copy.put(position, inputs)
        return copy

    def _activations(self, shapes: list[tuple[int, int]]) -> Activations:
        return Activations(
            shapes,
            self.stream.config.hidden_size,
            self.stream.dtype,
            self.stream.device,
            place=self.plan.place,
            directory=self.disk,
            tracked=self.team.from_leader(self.work is not None),
        )

    def copy_outer(self, writer: CheckpointWriter) -> None:
        """Write the tensors outside the blocks as they are."""
        for name, tensor in self.stream.outer_parameters():
            writer.add(name, self.stored(name, tensor))
        return_free_memory()

    def block(self, index: int, names: list[str], hidden: Activations) -> dict[str, Tensor]:
        """Quantize block `index`, or take it from the work directory; `hidden` becomes the inputs of the next block.

        Returns the block's tensors as they are to be written, by the names the model has for them.
        """
        with self.stream.block(index) as block:
            prefix = self.stream.block_name(index)
            linears = {name: _linear(block, name.removeprefix(f"{prefix}.")) for name in names}
            digest = self._digest(hidden)
            tensors = self._finished_before(index, block, linears, digest)
            if tensors is None:
                first = len(self.records)
                tensors = self._quantize_block(index, block, linears, hidden)
                if self.work is not None and digest is not None:
                    record = {"linears": [asdict(linear) for linear in self.records[first:]]}
                    self.work.put(step_name(index), digest, tensors, record)
            if index + 1 < self.stream.n_blocks:
                for position, inputs in enumerate(hidden):
                    hidden.put(position, self.stream.run(index, inputs))
            return tensors

    def _digest(self, hidden: Activations) -> str | None:
        """Of all that a block's result depends on beside its weights; None if no work directory asks for it."""
        if not hidden.tracked:
            return None
        return self.team.digest(hidden.digest() + ("" if self.full is None else self.full.digest()))

    def _finished_before(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear], digest: str | None
    ) -> dict[str, Tensor] | None:
        if digest is None:
            return None
        step = self.team.from_leader(None if self.work is None else self.work.get(step_name(index), digest))
        if step is None:
            return None
        self._advance_full(index)
        sizes = {name: self.config.group_size_of(name) for name in linears}
        install_block(block, self.stream.block_name(index), linears, step.tensors, sizes)
        for record in step.record["linears"]:
            self.records.append(LinearRecord(**record))
            self.report("resume", index, self.records[-1].name, self.records[-1].relative_error)
        return step.tensors

    def _quantize_block(
        self, index: int, block: nn.Module, linears: dict[str, nn.Linear], hidden: Activations
    ) -> dict[str, Tensor]:
        self.report("calibrate", index, None, None)
        packed: dict[str, Tensor] = {}
        originals = {} if self.full is None else {name: linear.weight.data for name, linear in linears.items()}
        if self.config.method == "rtn":
            self._quantize(index, [[name] for name in linears], linears, Calibrated({}), packed)
            self.quantized.clear()  # nothing runs through the block any more
        elif linears:
            in_order = stages(self.stream, index, linears, hidden[0])
            together = [[group for groups in in_order for group in groups]]
            for stage in in_order if self.config.true_sequential else together:
                for groups in self._passes(stage, linears):
                    found = self._calibrate(index, groups, linears, originals, hidden)
                    self._quantize(index, groups, linears, found, packed)
                self._replace_weights()
        with full_precision({name: linears[name] for name in originals}, originals):
            self._advance_full(index)
        kept = {
            name: self.stored(name, tensor)
            for name, tensor in _named_tensors(block, self.stream.block_name(index))
            if name.removesuffix(".weight") not in linears
        }
        return kept | packed

    def _calibrate(
        self,
        index: int,
        groups: Groups,
        linears: dict[str, nn.Linear],
        originals: dict[str, Tensor],
        hidden: Activations,
    ) -> Calibrated:
        cap = self.config.token_cap
        with self.costs.measure("hessians"):
            found = collect_hessians(self.stream, index, groups, linears, hidden, self.team.add_up, cap)
        self._warn_of_starved(found)
        if self.full is not None:
            with self.costs.measure("correct target"):
                self.crosses = collect_cross(
                    self.stream, index, groups, linears, originals, hidden, self.full, self.team.add_up, cap
                )
        return found

    def _advance_full(self, index: int) -> None:
        """The full-precision stream through block `index`, which must have its own weights now."""
        if self.full is None or index + 1 == self.stream.n_blocks:
            return
        with self.costs.measure("correct target"):
            for position, inputs in enumerate(self.full):
                self.full.put(position, self.stream.run(index, inputs))

    def _passes(self, stage: Groups, linears: dict[str, nn.Linear]) -> list[Groups]:
        """The groups of a stage in as many passes as their Hessians' memory asks for."""
        by_name = {group[0]: group for group in stage}
        sizes = [(name, linears[name].in_features) for name in by_name]
        return [[by_name[name] for name in names] for names in hessian_passes(sizes, self.plan.hessian_bytes)]

    def _replace_weights(self) -> None:
        """Quantized weights come into their block when its stage is done, so that every pass of one sees the same."""
        for linear, part in self.quantized:
            linear.weight = nn.Parameter(part.dequantize().to(linear.weight.dtype), requires_grad=False)
        self.quantized.clear()

    def _quantize(
        self,
        index: int,
        groups: Groups,
        linears: dict[str, nn.Linear],
        calibrated: Calibrated,
        packed: dict[str, Tensor],
    ) -> None:
        """Solve the groups, each in one process of the team, and note their codes, scales and records in all."""
        owners = share_out([self._cost(group, linears) for group in groups], self.team.size)
        solved = {
            group[0]: self._solve_group(index, group, linears, calibrated)
            for group, owner in zip(groups, owners, strict=True)
            if owner == self.team.rank
        }
        self.solved = 0
        for group, owner in zip(groups, owners, strict=True):
            parts, records = solved.pop(group[0], ({}, []))
            self.records += self.team.object_from(owner, records)
            for name in group:
                part = self._part_from(owner, parts.get(name), name, linears[name])
                packed[f"{name}.qweight"], packed[f"{name}.scales"] = pack(part)
                self.quantized.append((linears[name], part))

    def _cost(self, group: list[str], linears: dict[str, nn.Linear]) -> float:
        """Of solving a group, in multiplications: its factor, and the search and updates of its rows."""
        features = linears[group[0]].in_features
        return 2 * features**3 + sum(linears[name].out_features for name in group) * features * (features / 2 + 10_000)

    def _part_from(self, owner: int, part: QuantizedWeight | None, name: str, linear: nn.Linear) -> QuantizedWeight:
        group_size = self.config.group_size_of(name)
        if part is None:
            groups = linear.in_features // columns_per_group(linear.in_features, group_size)
            codes = torch.empty(linear.weight.shape, dtype=torch.uint8, device=linear.weight.device)
            scales = torch.empty(linear.out_features, groups, dtype=self.target, device=linear.weight.device)
            part = QuantizedWeight(codes, scales, None, group_size)
        codes, scales = (self.team.tensor_from(owner, tensor) for tensor in (part.codes, part.scales))
        return QuantizedWeight(codes, scales, None, group_size)

    def _solve_group(
        self, index: int, group: list[str], linears: dict[str, nn.Linear], calibrated: Calibrated
    ) -> tuple[dict[str, QuantizedWeight], list[LinearRecord]]:
        return_free_memory()
        hessian = self._hessian(group, calibrated) if self.config.method == "gptq" else None
        cross = self.crosses[group[0]].mean() if self.crosses else None
        parts: dict[str, QuantizedWeight] = {}
        records: list[LinearRecord] = []
        for names in self._of_one_group_size(group):
            return_free_memory()
            started = time.perf_counter()
            group_size = self.config.group_size_of(names[0])
            prepared = None if hessian is None else self._prepare(names, hessian, group_size)
            return_free_memory()
            # Rows are independent: linears of one input are solved as one tall weight under one Hessian.
            weight = torch.cat([self._weight(name, linears[name]) for name in names])
            if prepared is None:
                quantized = rtn_quantize(weight, group_size=group_size, scale_dtype=self.target)
            else:
                quantized = solve(
                    weight, prepared, self.config, self.target, cross=cross, rows=self.plan.rows, costs=self.costs
                )
            damp_percent = 0.0 if prepared is None else prepared.damp_percent
            seconds = time.perf_counter() - started
            row = 0
            for name in names:
                rows = slice(row, row + linears[name].out_features)
                row = rows.stop
                part = quantized.rows(rows.start, rows.stop)
                error = relative_error(weight[rows], part.dequantize(), hessian)
                share = seconds * linears[name].out_features / weight.shape[0]
                tokens = calibrated.tokens.get(group[0], 0)
                parts[name] = part
                records.append(linear_record(name, index, part, error, damp_percent, share, tokens))
                self.solved += 1
                self.report("quantize", index, name, error)
        return parts, records

    def _of_one_group_size(self, group: list[str]) -> Groups:
        sizes = dict.fromkeys(map(self.config.group_size_of, group))
        return [[name for name in group if self.config.group_size_of(name) == size] for size in sizes]

    def _warn_of_starved(self, found: Calibrated) -> None:
        if found.filled and self.team.leads:
            few = ", ".join(f"{name} {found.tokens[name]}" for name in sorted(found.filled)[:4])
            logger.warning(
                "%d of %d groups of linears are experts' that saw fewer tokens than they have input features (%s%s): "
                "other tokens of their layer fill their Hessians up; more calibration text helps",
                len(found.filled),
                len(found.hessians),
                few,
                ", …" if len(found.filled) > 4 else "",
            )

    def _weight(self, name: str, linear: nn.Linear) -> Tensor:
        require_finite(f"{name}.weight", linear.weight.to(self.target), f"they overflow {self.target}")
        return linear.weight.float()

    def _hessian(self, group: list[str], calibrated: Calibrated) -> Tensor:
        try:
            return calibrated.hessians[group[0]].mean()
        except ValueError as error:
            raise QuantizationError(f"{group[0]}: {error}; use more or other calibration text") from error

    def _prepare(self, names: list[str], hessian: Tensor, group_size: int) -> Prepared:
        try:
            prepared = prepare(hessian, self.config, group_size, self.costs)
        except NotPositiveDefinite as error:
            raise QuantizationError(f"{names[0]}: {error}; use more or other calibration text") from error
        except ValueError as error:
            raise QuantizationError(f"{names[0]}: {error}; try --dtype bfloat16") from error
        if prepared.damp_percent != self.config.damp_percent:
            logger.warning(
                "%s: the Hessian was not positive definite, damping raised from %g to %g",
                ", ".join(names),
                self.config.damp_percent,
                prepared.damp_percent,
            )
        return prepared


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def step_name(index: int) -> str:
    """What the work directory calls a block."""
    return f"block-{index:05d}"


def _named_tensors(block: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    return [(f"{prefix}.{name}", tensor) for name, tensor in block.state_dict().items()]
