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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.checkpoint import CheckpointWriter, TensorStore, require_space, staging_directory
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.modeling.architecture import (
    block_linears,
    read_config,
    require_divisible,
    require_finite,
    require_full_precision,
)
from marlin_gptq.modeling.blocks import BlockStream, stored_dtype
from marlin_gptq.modeling.linear import pack, padded_features
from marlin_gptq.modeling.observe import collect_cross, collect_hessians, full_precision, shared_inputs
from marlin_gptq.output_directory import write_companions
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.hessian import Cross, Hessian, NotPositiveDefinite, relative_error
from marlin_gptq.quantization.solve import Solution, solve
from marlin_gptq.quantization.weight import columns_per_group
from marlin_gptq.report import LinearRecord, ProgressEvent, QuantizeReport, linear_record
from marlin_gptq.tuning.memory import Sizes, plan
from marlin_gptq.tuning.stage import tune_checkpoint
from marlin_gptq.tuning.text import WINDOW, packed

logger = logging.getLogger(__name__)


def require_quantizable(
    model_dir: Path, output: Path, config: QuantizationConfig, dtype: torch.dtype | None = None
) -> None:
    """What can be known before any work, from config and file headers: InputError for a model that cannot be
    quantized as asked, CheckpointError if the result would not fit on the disk of `output`."""
    require_full_precision(model_dir, read_config(model_dir))
    stream = BlockStream(model_dir, device=torch.device("cpu"))
    size = _output_bytes(stream, _linears_of(stream, config), config, result_dtype(model_dir, dtype))
    require_space(output, size)


def require_memory(model_dir: Path, config: QuantizationConfig, device: torch.device) -> None:
    """QuantizationError, before any work, if the tuning that `config` asks for does not fit the GPU."""
    if device.type != "cuda":
        return
    plan(
        tuned_sizes(model_dir, config),
        batch=config.tune_batch,
        length=WINDOW,
        tune_codes=config.tune_codes,
        free=torch.cuda.mem_get_info(device)[0],
    )


def tuned_sizes(model_dir: Path, config: QuantizationConfig) -> Sizes:
    """A model as the tuning will see it, from config and file headers alone."""
    stream = BlockStream(model_dir, device=torch.device("cpu"))
    replaced = {f"{name}.weight": linear for block in _linears_of(stream, config) for name, linear in block.items()}
    weights = sum(linear.weight.numel() for linear in replaced.values())
    return Sizes(
        weights=weights,
        others=sum(elements for name, elements in stream.elements() if name not in replaced),
        group_size=config.group_size,
        blocks=stream.n_blocks,
        hidden_size=stream.config.hidden_size,
        intermediate_size=getattr(stream.config, "intermediate_size", None) or 4 * stream.config.hidden_size,
    )


def result_dtype(model_dir: Path, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of the result: as asked, else that of the checkpoint; float32 becomes float16."""
    stored = stored_dtype(TensorStore(model_dir), quantized=False)
    return asked or (stored if stored in (torch.float16, torch.bfloat16) else torch.float16)


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
) -> QuantizeReport:
    """Quantize the decoder linears of `model_dir` into the new directory `output`.

    samples   token ids, int64 [T] each, of their natural lengths; may be empty for method rtn.
    dtype     float16 or bfloat16 of the result; None keeps the checkpoint's (float32 becomes float16).
    base_model  what the log and the model card call the source; by default the name of its directory.
    shard_size, in bytes, is also the most output that waits in host memory.

    Nothing appears under `output` before everything is written. Raises InputError, CheckpointError or
    QuantizationError, each naming what is wrong; an interrupted run leaves nothing behind.
    """
    started = time.perf_counter()
    if config.method == "gptq" and not samples:
        raise InputError("samples: got none, GPTQ needs calibration text; use method rtn to round without it")
    require_full_precision(model_dir, read_config(model_dir))
    if config.method == "gptq" and config.tune_steps:
        require_memory(model_dir, config, device)
        with staging_directory(output, overwrite) as staging:
            first = quantize_model(
                model_dir, staging / output.name, replace(config, tune_steps=0), samples,
                device=device, dtype=dtype, shard_size=shard_size, base_model=base_model, calibration=calibration,
                progress=progress,
            )  # fmt: skip
            return tune_checkpoint(
                model_dir, first.output, output, first, config, samples,
                device=device, shard_size=shard_size, overwrite=overwrite, progress=progress,
            )  # fmt: skip
    if config.method == "gptq" and config.pack:
        samples = packed(samples, getattr(read_config(model_dir), "max_position_embeddings", None))
    target = result_dtype(model_dir, dtype)
    stream = BlockStream(model_dir, device=device, dtype=target if device.type == "cuda" else torch.float32)
    linears = _linears_of(stream, config)
    require_space(output, _output_bytes(stream, linears, config, target))
    run = _Run(stream, config, target, sum(map(len, linears)), progress, Costs(device))

    with CheckpointWriter(output, shard_size=shard_size, overwrite=overwrite) as writer:
        hidden = run.embed(samples) if config.method == "gptq" else []
        run.full = list(hidden) if config.correct_target else []
        for name, tensor in stream.outer_parameters():
            writer.add(name, run.stored(name, tensor))
        for index, names in enumerate(linears):
            hidden = run.block(index, list(names), hidden, writer)
        run.report("write", stream.n_blocks - 1, None, None)
        unknown = stream.unknown_tensors()
        if unknown:
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
            bytes_after=writer.total_bytes,
            peak_gpu_bytes=run.costs.peak_gpu_bytes(),
            unknown_tensors=unknown,
            costs=run.costs.by_name,
            records=run.records,
        )
        write_companions(writer, model_dir, report)
        writer.finish()
    return report


def _linears_of(stream: BlockStream, config: QuantizationConfig) -> list[dict[str, nn.Linear]]:
    """The linears to quantize, block by block; InputError if a group does not fit or there is nothing to do."""
    linears = []
    for index in range(stream.n_blocks):
        linears.append(block_linears(stream.block_module(index), stream.block_name(index), config))
        require_divisible(linears[-1], config.group_size)
    if not any(linears):
        raise InputError(f"skip: {', '.join(config.skip)} leaves no linear to quantize")
    return linears


def _output_bytes(
    stream: BlockStream, linears: list[dict[str, nn.Linear]], config: QuantizationConfig, target: torch.dtype
) -> int:
    """Bytes of all tensors of the result, exactly; safetensors headers and small files come on top."""
    replaced = {name: linear for block in linears for name, linear in block.items()}
    size = 0
    for linear in replaced.values():
        k, n = padded_features(linear.in_features, linear.out_features)
        groups = linear.in_features // columns_per_group(linear.in_features, config.group_size)
        size += k * n // 2 + groups * n * target.itemsize
    for name, elements in stream.elements():
        if name.removesuffix(".weight") not in replaced:
            size += elements * target.itemsize
    return size


@dataclass
class _Run:
    """What every step of one quantization shares."""

    stream: BlockStream
    config: QuantizationConfig
    target: torch.dtype
    total: int
    progress: Callable[[ProgressEvent], None] | None
    costs: Costs
    records: list[LinearRecord] = field(default_factory=list)
    # For correct_target only: the samples after full-precision blocks, and a stage's sums against those that arrive.
    full: list[Tensor] = field(default_factory=list)
    crosses: dict[str, Cross] = field(default_factory=dict)

    def report(self, stage: str, block: int, linear: str | None, error: float | None) -> None:
        if self.progress is not None:
            done = len(self.records)
            self.progress(ProgressEvent(stage, block, self.stream.n_blocks, linear, done, self.total, error))

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Floats in the dtype of the result; QuantizationError where they overflow it."""
        if not tensor.is_floating_point():
            return tensor
        require_finite(name, tensor, "the checkpoint is damaged")
        cast = tensor.to(self.target)
        require_finite(name, cast, f"they overflow {self.target}; use --dtype bfloat16")
        return cast

    def embed(self, samples: list[Tensor]) -> list[Tensor]:
        """Block 0's inputs, [B, T, hidden] each (B is 1 for documents), on the device if half of its free memory holds
        them."""
        vocabulary = self.stream.config.vocab_size
        place = self._place(sum(sample.numel() for sample in samples))
        hidden = []
        for sample in samples:
            if int(sample.max()) >= vocabulary or int(sample.min()) < 0:
                raise InputError(
                    f"token {int(sample.max())} is outside the model's vocabulary of {vocabulary}: the tokenizer "
                    "does not belong to this model"
                )
            hidden.append(self.stream.embed(sample.reshape(-1, sample.shape[-1])).to(place))
        self.stream.release()
        return hidden

    def _place(self, tokens: int) -> torch.device:
        if self.stream.device.type != "cuda":
            return self.stream.device
        size = tokens * self.stream.config.hidden_size * self.stream.dtype.itemsize
        free, _ = torch.cuda.mem_get_info(self.stream.device)
        return self.stream.device if size < free / 2 else torch.device("cpu")

    def block(self, index: int, names: list[str], hidden: list[Tensor], writer: CheckpointWriter) -> list[Tensor]:
        """Quantize block `index`, write its tensors, return the inputs of the next block."""
        with self.stream.block(index) as block:
            prefix = self.stream.block_name(index)
            linears = {name: _linear(block, name.removeprefix(f"{prefix}.")) for name in names}
            self.report("calibrate", index, None, None)
            packed: dict[str, Tensor] = {}
            if self.config.method == "rtn":
                groups = [[name] for name in names]
                self._quantize(index, groups, linears, {}, packed)
            elif names:
                groups = shared_inputs(self.stream, index, linears, hidden[0])
                originals = {name: linear.weight.data for name, linear in linears.items()}
                for stage in [[group] for group in groups] if self.config.true_sequential else [groups]:
                    cap = self.config.token_cap
                    with self.costs.measure("hessians"):
                        hessians = collect_hessians(self.stream, index, stage, linears, hidden, cap)
                    self.crosses = {}
                    if self.config.correct_target:
                        with self.costs.measure("correct target"):
                            self.crosses = collect_cross(
                                self.stream, index, stage, linears, originals, hidden, self.full, cap
                            )
                    self._quantize(index, stage, linears, hessians, packed)
                if self.config.correct_target:
                    with self.costs.measure("correct target"), full_precision(linears, originals):
                        self.full = [self.stream.run(index, h.to(self.stream.device)).to(h.device) for h in self.full]
            for name, tensor in _named_tensors(block, prefix):
                if name.removesuffix(".weight") not in linears:
                    writer.add(name, self.stored(name, tensor))
            for name, tensor in packed.items():
                writer.add(name, tensor)
            if self.config.method == "rtn" or index + 1 == self.stream.n_blocks:
                return []
            return [self.stream.run(index, h.to(self.stream.device)).to(h.device) for h in hidden]

    def _quantize(
        self,
        index: int,
        groups: list[list[str]],
        linears: dict[str, nn.Linear],
        hessians: dict[str, Hessian],
        packed: dict[str, Tensor],
    ) -> None:
        for group in groups:
            started = time.perf_counter()
            # Rows are independent: linears of one input are solved as one tall weight under one Hessian.
            weight = torch.cat([self._weight(name, linears[name]) for name in group])
            hessian, damp_percent = None, 0.0
            if self.config.method == "rtn":
                quantized = rtn_quantize(weight, group_size=self.config.group_size, scale_dtype=self.target)
            else:
                hessian, solution = self._solve(group, weight, hessians)
                quantized, damp_percent = solution.quantized, solution.damp_percent
            seconds = time.perf_counter() - started
            row = 0
            for name in group:
                linear = linears[name]
                rows = slice(row, row + linear.out_features)
                row = rows.stop
                part = quantized.rows(rows.start, rows.stop)
                error = relative_error(weight[rows], part.dequantize(), hessian)
                share = seconds * linear.out_features / weight.shape[0]
                self.records.append(linear_record(name, index, part, error, damp_percent, share))
                packed[f"{name}.qweight"], packed[f"{name}.scales"] = pack(part)
                linear.weight = nn.Parameter(part.dequantize().to(linear.weight.dtype), requires_grad=False)
                self.report("quantize", index, name, error)

    def _weight(self, name: str, linear: nn.Linear) -> Tensor:
        require_finite(f"{name}.weight", linear.weight.to(self.target), f"they overflow {self.target}")
        return linear.weight.float()

    def _solve(self, group: list[str], weight: Tensor, hessians: dict[str, Hessian]) -> tuple[Tensor, Solution]:
        try:
            hessian = hessians[group[0]].mean()
            cross = self.crosses[group[0]].mean() if self.crosses else None
            solution = solve(weight, hessian, self.config, self.target, cross=cross, costs=self.costs)
        except NotPositiveDefinite as error:
            raise QuantizationError(f"{group[0]}: {error}; use more or other calibration text") from error
        except ValueError as error:
            raise QuantizationError(f"{group[0]}: {error}; try --dtype bfloat16") from error
        if solution.damp_percent != self.config.damp_percent:
            logger.warning(
                "%s: the Hessian was not positive definite, damping raised from %g to %g",
                ", ".join(group),
                self.config.damp_percent,
                solution.damp_percent,
            )
        return hessian, solution


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _named_tensors(block: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    return [(f"{prefix}.{name}", tensor) for name, tensor in block.state_dict().items()]
