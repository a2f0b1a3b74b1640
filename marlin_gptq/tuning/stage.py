"""The stage after the blocks: a quantized directory in, the same directory tuned end to end out.

windows of the calibration text, and of text that the model writes itself
what the full-precision model's head sees of them, block by block
tune the whole quantized model against it
write codes, scales and norm weights
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.costs import Costs
from marlin_gptq.device_memory import free_bytes, give_back
from marlin_gptq.modeling.architecture import context_length, read_config, require_finite
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.classes import text_config
from marlin_gptq.output_directory import write_companions
from marlin_gptq.placement import Placement
from marlin_gptq.report import ProgressEvent, QuantizeReport, rescaled
from marlin_gptq.tuning.end_to_end import Diverged, Rates, mean_divergence, teacher_hidden, tune
from marlin_gptq.tuning.memory import Plan, plan
from marlin_gptq.tuning.student import Student
from marlin_gptq.tuning.text import window_length, windows, written_by_model

logger = logging.getLogger(__name__)
Progress = Callable[[ProgressEvent], None]
# Values of the widest activation while a batch of windows passes a block on a GPU: many windows of a small model, whose
# kernels would be over before the next is launched, few of a large one. A CPU gains nothing.
_TEACHER_VALUES, _TEACHER_BATCH_WITHOUT_GPU = 1 << 27, 8
# One in so many windows of calibration text is kept aside to judge the result by.
_JUDGED = 16
# Text is written so many windows at a time. On a GPU fewer if their keys, values and logits would fill a quarter of it:
# launched one by one, the kernels of a small model take as long for many windows as for few. A CPU gains nothing.
_WRITING_BATCH, _WRITING_BATCH_WITHOUT_GPU = 2048, 128
# How often the tuning is begun where the loss rises, and how much smaller the learning rates are each time.
_TRIES, _SLOWER = 4, 4
# Tables of logits a step holds, in float32: the model's, their copy, probabilities, what is drawn from them.
_LOGIT_TABLES = 4


def tune_checkpoint(
    model_dir: Path,
    quantized_dir: Path,
    output: Path,
    first: QuantizeReport,
    config: QuantizationConfig,
    samples: list[Tensor],
    *,
    device: torch.device,
    shard_size: int,
    overwrite: bool,
    seed: int = 0,
    progress: Progress | None = None,
    place: Placement | None = None,
) -> QuantizeReport:
    """Tune `quantized_dir`, made from `model_dir` as `first` reports, into the new directory `output`.

    samples are those of the calibration; `place` is a placement of `output` that was begun before. Relative errors in
    the report stay those before the tuning, whose measure is the output of the model and not of its linears. Raises
    QuantizationError where the model does not fit the device.
    """
    started = time.perf_counter()
    costs = Costs(device)
    length = window_length(samples, context_length(text_config(read_config(model_dir))))
    text = windows(samples, length)
    judged = max(1, len(text) // _JUDGED)  # the first of them: nothing is learnt from these, unless there are no others
    tell = _Teller(progress, first)
    if config.tune_written:
        with costs.measure("write text"):
            text = torch.cat([text, _written(model_dir, samples, config.tune_written, length, device, seed, tell)])
            give_back(device)  # its model, cache and graphs
    with costs.measure("teacher"):
        stream = BlockStream(model_dir, device=device)
        teacher = teacher_hidden(stream, text, _teacher_batch(stream.config, length, device), tell("teacher"))
        del stream
        give_back(device)
    learnt = slice(judged, None) if len(text) > judged else slice(None)

    def _start() -> Student:
        return Student(model_dir, quantized_dir, tune_codes=config.tune_codes, length=length, device=device)

    with costs.measure("tune end to end"):
        student, used = _start(), _rates(config)
        cut = planned(student, config, length, device, teacher)
        before = mean_divergence(student, text[:judged], teacher[:judged], cut.micro_batch)
        started_from = {name: layer.quantized().codes for name, layer in student.layers.items()}
        rise = ""
        for attempt in range(_TRIES):
            if attempt:
                used = used.slower(_SLOWER)
                logger.warning(
                    "tuning end to end begins again with learning rates of %g (codes) and %g (scales and norms), a "
                    "quarter of what they were: %s",
                    used.codes,
                    used.scales,
                    rise,
                )
                del student  # before there is another: two may not fit
                give_back(device)
                student = _start()
            try:
                tune(
                    student,
                    text[learnt],
                    teacher[learnt],
                    steps=config.tune_steps,
                    batch=config.tune_batch,
                    rates=used,
                    seed=seed,
                    cut=cut,
                    before=before,
                    progress=tell("tune"),
                )
                break
            except Diverged as error:
                rise = str(error)
        after = mean_divergence(student, text[:judged], teacher[:judged], cut.micro_batch)
    helped = after < before
    if not helped:
        logger.warning(
            "tuning end to end did not help: KL %.5f before, %.5f after on %d windows it had not seen; the untuned "
            "model is kept. More text (--n-samples, --tune-written) or a smaller --tune-rate may help",
            before,
            after,
            judged,
        )
    seconds = costs.rest("tuning, other", started)
    moved = sum(int((layer.quantized().codes != started_from[name]).sum()) for name, layer in student.layers.items())
    report = replace(
        first,
        output=output,
        config=config,
        seconds=first.seconds + seconds,
        costs=first.costs | costs.by_name,
        peak_gpu_bytes=_larger(first.peak_gpu_bytes, costs.peak_gpu_bytes()),
        records=[
            rescaled(record, student.layers[record.name].quantized()) if helped else record for record in first.records
        ],
        tuning={
            "windows": len(text),
            "window_tokens": length,
            "windows_judged": judged,
            "kl_before": before,
            "kl_after": after,
            "kept": helped,
            "rates": {"codes": used.codes, "scales": used.scales},
            "codes_changed": moved / sum(codes.numel() for codes in started_from.values()),
        },
    )
    _write(model_dir, quantized_dir, student if helped else None, report, shard_size, overwrite, place)
    return report


def _rates(config: QuantizationConfig) -> Rates:
    return Rates(config.tune_scale_rate, config.tune_scale_rate, config.tune_rate)


def planned(student: Student, config: QuantizationConfig, length: int, device: torch.device, teacher: Tensor) -> Plan:
    """How a step is cut up on this device; on a CPU one window at a time, which keeps it in its caches.

    The student, which is on the device already, is counted in what is needed; the teacher's hidden states are not.
    """
    if device.type != "cuda":
        return Plan(1, False, 0)
    held = teacher.numel() * teacher.itemsize if teacher.is_cuda else 0
    return plan(
        student.sizes(),
        batch=config.tune_batch,
        length=length,
        tune_codes=config.tune_codes,
        free=free_bytes(device) + torch.cuda.memory_allocated(device) - held,
    )


def _teacher_batch(config: Any, length: int, device: torch.device) -> int:
    if device.type != "cuda":
        return _TEACHER_BATCH_WITHOUT_GPU
    widest = max(config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return max(1, _TEACHER_VALUES // (length * widest))


def _written(
    model_dir: Path,
    samples: list[Tensor],
    count: int,
    length: int,
    device: torch.device,
    seed: int,
    tell: _Teller,
) -> Tensor:
    from transformers import AutoModelForCausalLM

    dtype = "auto" if device.type == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model = model.to(device).eval()
    batch = min(count, _WRITING_BATCH_WITHOUT_GPU)
    if device.type == "cuda":
        heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
        head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
        window = 2 * model.config.num_hidden_layers * heads * head * length * model.dtype.itemsize
        window += _LOGIT_TABLES * 4 * model.config.vocab_size
        most = max(1, min(count, _WRITING_BATCH, free_bytes(device) // 4 // window))
        batch = math.ceil(count / math.ceil(count / most))  # equal ones: steps are recorded for one size
    return written_by_model(
        model, samples, count=count, length=length, batch=batch, seed=seed, progress=tell("write text")
    )


def _write(
    model_dir: Path,
    quantized_dir: Path,
    student: Student | None,
    report: QuantizeReport,
    shard_size: int,
    overwrite: bool,
    place: Placement | None,
) -> None:
    """The quantized directory once more, with what the student has changed, if there is one."""
    store = TensorStore(quantized_dir)
    dtype = store.dtype(next(name for name in store.names if name.endswith(".scales")))
    tuned = {} if student is None else dict(student.tensors(dtype))
    inputs = {"the model": model_dir}
    with CheckpointWriter(
        report.output, shard_size=shard_size, overwrite=overwrite, inputs=inputs, place=place
    ) as writer:
        for name in store.names:
            tensor = tuned.pop(name) if name in tuned else store.get(name)
            if tensor.is_floating_point():
                require_finite(name, tensor, "the tuning diverged; use a smaller --tune-rate")
            writer.add(name, tensor)
        assert not tuned, f"tuned tensors without a place: {sorted(tuned)}"
        write_companions(writer, model_dir, report)
        writer.finish()


def _larger(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else max(one, other)


class _Teller:
    """Turns (done, total) of a part of the stage into events."""

    def __init__(self, progress: Progress | None, first: QuantizeReport) -> None:
        self.progress = progress
        self.blocks = 1 + max((record.block for record in first.records), default=0)

    def __call__(self, stage: str) -> Callable[..., Any] | None:
        if self.progress is None:
            return None
        tell = self.progress
        return lambda done, total, error=None: tell(
            ProgressEvent(stage, self.blocks - 1, self.blocks, None, done, total, error)
        )
