"""End-to-end tuning: the quantized model learns to give the full-precision model's next-token distributions.

What is minimised is what accuracy is judged by, KL(full precision ‖ quantized), over windows of text, through
all blocks at once (as EfficientQAT's second phase does for scales: Chen et al., arXiv 2407.11062; distillation and
self-written text as LLM-QAT: Liu et al., arXiv 2305.17888).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.device_memory import free_bytes
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.quantization.distillation import divergence
from marlin_gptq.quantization.tunable import clamp_
from marlin_gptq.tuning.memory import Plan
from marlin_gptq.tuning.replay import Direct, Replayed
from marlin_gptq.tuning.student import Student

logger = logging.getLogger(__name__)
BETAS = (0.9, 0.95)
# The loss is looked at, and told, every so many steps. Windows differ, so that it must have risen this much to have
# risen at all.
_WATCHED, _RISEN = 10, 1.5


class Diverged(Exception):
    """The loss rises: the learning rates are too large for this model."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam: relative steps of scales and norm weights, steps of codes in units of a code."""

    scales: float = 1e-3
    norms: float = 1e-3
    codes: float = 2e-3

    def slower(self, times: float) -> Rates:
        """All of them divided by `times`."""
        return Rates(self.scales / times, self.norms / times, self.codes / times)


@torch.no_grad()
def teacher_hidden(
    stream: BlockStream, windows: Tensor, batch: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """What the full-precision model's head sees: [windows, T, hidden_size] in the stream's dtype, on the device if a
    quarter of its free memory holds it, else on the host.

    windows int64 [windows, T], of which `batch` pass at once. One block is on the device at a time.
    """
    device = stream.device
    shape = (*windows.shape, stream.config.hidden_size)
    aside = device.type == "cuda" and math.prod(shape) * stream.dtype.itemsize > free_bytes(device) / 4
    states = host_memory(shape, stream.dtype) if aside else torch.empty(shape, dtype=stream.dtype, device=device)

    def through(run: Callable[[Tensor], Tensor]) -> None:
        # One stream of work and of copies: a batch is written where it was read before the next one is read.
        for part in states.split(batch):
            part.copy_(run(part.to(device, non_blocking=True)), non_blocking=True)

    if progress is not None:
        progress(0, stream.n_blocks)
    for part, ids in zip(states.split(batch), windows.split(batch), strict=True):
        part.copy_(stream.embed(ids), non_blocking=True)
    for index in range(stream.n_blocks):
        with stream.block(index):
            through(partial(stream.run, index))
        if progress is not None:
            progress(index + 1, stream.n_blocks)
    through(stream.final)
    stream.release()
    if aside:
        torch.cuda.synchronize(device)  # the host reads it next
    return states


def host_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Empty host memory for copies from and to a GPU, page-locked if that can be had: pageable copies crawl.

    torch page-locks powers of two: memory up to the next one is lost to everybody else, so half of what is free must
    hold that.
    """
    locked = 1 << (math.prod(shape) * dtype.itemsize - 1).bit_length()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    reason = f"{locked / 1e9:.1f} GB would be, and {free / 1e9:.1f} GB are free"
    if locked <= free / 2:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
    logger.warning("the teacher's hidden states are not page-locked (%s): teacher and tuning take longer", reason)
    return torch.empty(shape, dtype=dtype)


def rows_of(states: Tensor, chosen: Tensor, device: torch.device) -> Tensor:
    """The rows of `states`, which may lie on the host, that `chosen` int64 [n] on the CPU names: on `device`.

    From the host row by row: gathered there first, all would be copied twice.
    """
    if states.device == device:
        return states[chosen.to(device, non_blocking=True)]
    rows = torch.empty((len(chosen), *states.shape[1:]), dtype=states.dtype, device=device)
    for place, row in enumerate(chosen.tolist()):
        rows[place].copy_(states[row], non_blocking=True)
    return rows


def tune(
    student: Student,
    windows: Tensor,
    teacher: Tensor,
    *,
    steps: int,
    batch: int,
    rates: Rates,
    seed: int,
    cut: Plan | None = None,
    before: float = 0.0,
    progress: Callable[[int, int, float | None], None] | None = None,
) -> list[float]:
    """`steps` steps of Adam on the mean KL of `batch` windows each; the losses, one a step.

    windows  int64 [windows, T]; teacher [windows, T, hidden_size] of `teacher_hidden`.
    cut      how a step runs in parts; None runs it whole.
    before   the mean KL over other windows, for one batch may be an easy one.
    Windows are taken in a random order given by `seed`, each once before any twice.
    Raises Diverged as soon as the loss of ten steps is half as much again as `before` and the first loss, or NaN.
    """
    kinds = student.parameters()
    device = student.head()[0].device
    cut = cut or Plan(batch, False, 0)
    recorded = device.type == "cuda" and not cut.checkpointing and student.recordable
    student.keep_activations(not cut.checkpointing)
    groups: list[dict[str, Any]] = []
    for kind, members in kinds.items():
        rate: float = getattr(rates, kind)
        if members:
            # A recorded step reads its learning rate from the device.
            groups.append({"params": members, "lr": torch.tensor(rate, device=device) if recorded else rate})
    # In one kernel on a GPU: the others make tables as large as all weights, which `memory` does not count.
    way: dict[str, bool] = {"fused": True} if device.type == "cuda" else {"foreach": True}
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12, capturable=recorded, **way)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))

    def step(ids: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros((), device=device)
        for some, goal in zip(ids.split(cut.micro_batch), target.split(cut.micro_batch), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = student.hidden(some)
            loss = divergence(hidden.float().flatten(0, 1), goal.flatten(0, 1), *student.head())
            loss = loss * (len(some) / len(ids))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        clamp_(student.layers.values())
        return total

    run = Replayed(step, optimizer) if recorded else Direct(step, optimizer)
    losses = []
    windows = windows.to(device)
    if progress is not None:
        progress(0, steps, None)
    with tensor_cores():
        for number, chosen in enumerate(batches(len(windows), batch, steps, seed), start=1):
            losses.append(run(rows_of(windows, chosen, device), rows_of(teacher, chosen, device)).clone())
            schedule.step()
            if number % _WATCHED == 0:
                require_progress(max(before, float(losses[0])), [float(loss) for loss in losses[-_WATCHED:]])
            if progress is not None and (number % _WATCHED == 0 or number == steps):
                progress(number, steps, float(losses[-1]))
    return [float(loss) for loss in losses]


def require_progress(before: float, last: Sequence[float]) -> None:
    """Diverged if the `last` losses are far above that `before`."""
    now = fmean(last)
    if not now <= _RISEN * before:
        raise Diverged(f"the KL that is learnt from went from {before:.5f} to {now:.5f}")


@torch.no_grad()
def mean_divergence(student: Student, windows: Tensor, teacher: Tensor, batch: int = 1) -> float:
    """Mean KL in nats over windows int64 [windows, T] that nothing is learnt from, `batch` at once; arguments as of
    `tune`."""
    weight, bias = student.head()
    total = 0.0
    with tensor_cores():
        for ids, target in zip(windows.split(batch), teacher.split(batch), strict=True):
            with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.device.type == "cuda"):
                hidden = student.hidden(ids.to(weight.device))
            aim = target.to(weight.device).flatten(0, 1)
            total += float(divergence(hidden.float().flatten(0, 1), aim, weight, bias)) * len(ids)
    return total / len(windows)


def learning_rate(step: int, steps: int) -> float:
    """Factor of the learning rate: up over the first twentieth, then down to 0 along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` index tensors [batch] into `count` windows: permutations one after the other."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(waiting) < batch:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield chosen


@contextmanager
def tensor_cores() -> Iterator[None]:
    """float32 products in TF32 on a GPU meanwhile: its 10 bits of fraction are float16's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
