"""End-to-end tuning: the quantized model learns to give the full-precision model's next-token distributions.

What is minimised is what accuracy is judged by, KL(full precision ‖ quantized), over windows of text, through
all blocks at once (as EfficientQAT's second phase does for scales: Chen et al., arXiv 2407.11062; distillation and
self-written text as LLM-QAT: Liu et al., arXiv 2305.17888).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.quantization.distillation import divergence
from marlin_gptq.tuning.memory import Plan
from marlin_gptq.tuning.replay import Direct, Replayed
from marlin_gptq.tuning.student import Student

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam: relative steps of scales and norm weights, steps of codes in units of a code."""

    scales: float = 1e-3
    norms: float = 1e-3
    codes: float = 2e-3


@torch.no_grad()
def teacher_hidden(
    stream: BlockStream, windows: Tensor, batch: int, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """What the full-precision model's head sees: [windows, T, hidden_size] in the stream's dtype, on the device if a
    quarter of its free memory holds it, else on the host.

    windows int64 [windows, T]. One block is on the device at a time.
    """
    size = windows.numel() * stream.config.hidden_size * stream.dtype.itemsize
    place = stream.device
    if place.type == "cuda" and size > torch.cuda.mem_get_info(place)[0] / 4:
        place = torch.device("cpu")
    hidden = [stream.embed(ids).to(place) for ids in windows.split(batch)]
    for index in range(stream.n_blocks):
        with stream.block(index):
            hidden = [stream.run(index, part.to(stream.device)).to(place) for part in hidden]
        if progress is not None:
            progress(index + 1, stream.n_blocks)
    final = torch.cat([stream.final(part.to(stream.device)).to(place) for part in hidden])
    stream.release()
    return final


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
    progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """`steps` steps of Adam on the mean KL of `batch` windows each; the losses, one a step.

    windows  int64 [windows, T]; teacher [windows, T, hidden_size] of `teacher_hidden`.
    cut      how a step runs in parts; None runs it whole.
    Windows are taken in a random order given by `seed`, each once before any twice.
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
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12, capturable=recorded, foreach=True)
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
        for layer in student.layers.values():
            layer.clamp_()
        return total

    run = Replayed(step, optimizer) if recorded else Direct(step, optimizer)
    losses = []
    with tensor_cores():
        for number, chosen in enumerate(batches(len(windows), batch, steps, seed), start=1):
            losses.append(run(windows[chosen].to(device), teacher[chosen.to(teacher.device)].to(device)).clone())
            schedule.step()
            if progress is not None and (number % 10 == 0 or number == steps):
                progress(number, steps, float(losses[-1]))
    return [float(loss) for loss in losses]


@torch.no_grad()
def mean_divergence(student: Student, windows: Tensor, teacher: Tensor) -> float:
    """Mean KL in nats over windows int64 [windows, T] that nothing is learnt from; arguments as of `tune`."""
    weight, bias = student.head()
    total = 0.0
    with tensor_cores():
        for ids, target in zip(windows, teacher, strict=True):
            with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.device.type == "cuda"):
                hidden = student.hidden(ids[None].to(weight.device))
            total += float(divergence(hidden.float()[0], target.to(weight.device), weight, bias))
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
