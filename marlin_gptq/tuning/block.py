"""One block tuned by itself: from the inputs that it gets behind quantized blocks it learns to give what the
full-precision model has there.

What the end-to-end tuning does for the whole model this does with one block on the device. Not the model's output is
kept but the stream behind every block (reconstruction of blocks: Li et al., BRECQ, arXiv 2102.05426; with all weights
of a block moving: Chen et al., EfficientQAT, arXiv 2407.11062; rounding by gradient: Cheng et al., AutoRound, arXiv
2309.05516). So a block makes up, as far as it can, for what those before it did to its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.distributed import Team
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.attention import backward
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.quantization.tunable import TunableWeight, clamp_
from marlin_gptq.quantization.weight import QuantizedWeight
from marlin_gptq.report import BlockRecord
from marlin_gptq.tuning.block_memory import TUNED_TOKENS
from marlin_gptq.tuning.end_to_end import BETAS, Rates, batches, learning_rate
from marlin_gptq.tuning.replay import Replayed
from marlin_gptq.tuning.student import one_kernel_norms

# One in so many samples is kept aside to judge the result by.
_JUDGED = 16
# Steps between two reports of progress.
_TOLD = 10
ALONE = Team()


@dataclass(frozen=True)
class TunedBlock:
    """What the tuning of a block came to.

    parts   codes and scales of its linears, by full name.
    norms   norm weights that changed, by name inside the block, as they will be stored.
    record  says whether all that is to be kept.
    """

    parts: dict[str, QuantizedWeight]
    norms: dict[str, Tensor]
    record: BlockRecord


def tune_block(
    stream: BlockStream,
    index: int,
    originals: Mapping[str, Tensor],
    parts: Mapping[str, QuantizedWeight],
    inputs: Activations,
    wanted: Activations,
    config: QuantizationConfig,
    stored: torch.dtype,
    *,
    progress: Callable[[int], None] | None = None,
    together: int = TUNED_TOKENS,
    team: Team = ALONE,
) -> TunedBlock:
    """`config.tune_block_steps` steps of Adam on ‖block(x) − y‖² / ‖y‖², the mean over the tokens of a few samples.

    stream, index   the entered block; its norm weights are those to begin with.
    originals, parts  of its quantized linears, by full name: the weights before, and codes and scales as solved.
    inputs, wanted  x and y, all samples at the same places: the block's inputs, and what it should make of them. One
                    sample in 16, or the only one, is kept aside to judge by.
    stored          the dtype in which norm weights are stored.
    together        tokens of samples that pass the block together, unless one alone has more; 0 is one at a time.
    team            processes with samples of their own, which share a step's samples and have the same result.

    The block stays as it is. Samples come in an order given by the block's number, so that a run that is done again
    gives the same. The tuned block is to be kept only if its error on the samples kept aside is smaller, computed as
    the quantized block will run, with stored weights in the stream's dtype.
    """
    prefix = f"{stream.block_name(index)}."
    own = {name: f"{name.removeprefix(prefix)}.weight" for name in parts}
    samples = _Samples(stream, index, inputs, wanted, together)
    judged = list(range(0, len(samples), _JUDGED))
    learnt = [number for number in range(len(samples)) if number % _JUDGED] or judged
    before, _ = _error({own[name]: part for name, part in parts.items()}, {}, samples, judged, team)
    tunable = _Tunable(stream.block_module(index), originals, parts, own, config.tune_codes)
    _learn(tunable, samples, learnt, config, progress, team)
    tuned, norms = tunable.stored(stored)
    after, count = _error(tuned, norms, samples, judged, team)
    found = {name: tuned[own[name]] for name in parts}
    moved = sum(int((found[name].codes != part.codes).sum()) for name, part in parts.items())
    record = BlockRecord(
        block=index,
        error_before=before,
        error_after=after if math.isfinite(after) else None,
        kept=after < before,
        samples_judged=count,
        codes_changed=moved / sum(part.codes.numel() for part in parts.values()),
    )
    return TunedBlock(found, norms, record)


def summary(record: BlockRecord) -> str:
    """For people."""
    after = "NaN" if record.error_after is None else f"{record.error_after:.5f}"
    return f"tuned: error {record.error_before:.5f} -> {after}" + ("" if record.kept else ", not kept")


class _Samples:
    """What passes the block, and what it should become: documents or, where they wait in batches, every window by
    itself; by number."""

    def __init__(
        self, stream: BlockStream, index: int, inputs: Activations, wanted: Activations, together: int
    ) -> None:
        self.stream, self.index, self.inputs, self.wanted, self.together = stream, index, inputs, wanted, together
        self.places = [(position, row) for position, (rows, _) in enumerate(inputs.shapes) for row in range(rows)]

    def __len__(self) -> int:
        return len(self.places)

    def length(self, number: int) -> int:
        """Its tokens."""
        return self.inputs.shapes[self.places[number][0]][1]

    def alike(self, chosen: list[int], batch: int) -> bool:
        """Whether any `batch` of those chosen pass the block together, in one shape."""
        lengths = {self.length(number) for number in chosen}
        return len(lengths) == 1 and batch * max(lengths) <= max(self.together, max(lengths))

    def packs(self, chosen: list[int]) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
        """(hidden states, what they should become, lengths for `BlockStream.run`) of those chosen that pass the block
        together: as a batch where all are equally long, else one behind the other."""
        lengths = [self.length(number) for number in chosen]
        if len(set(lengths)) == 1:
            count = max(1, self.together // lengths[0])
            for first in range(0, len(chosen), count):
                some = chosen[first : first + count]
                yield self._rows(self.inputs, some, 0), self._rows(self.wanted, some, 0), ()
            return
        for pack in self.stream.packs(self.index, [(1, length) for length in lengths], self.together):
            some = chosen[pack.start : pack.stop]
            yield (
                self._rows(self.inputs, some, 1),
                self._rows(self.wanted, some, 1),
                tuple(lengths[pack.start : pack.stop]),
            )

    def _rows(self, activations: Activations, chosen: list[int], dim: int) -> Tensor:
        return torch.cat([activations.row(*self.places[number]) for number in chosen], dim=dim)


class _Tunable:
    """The weights of a block that move, by their names inside it."""

    def __init__(
        self,
        block: nn.Module,
        originals: Mapping[str, Tensor],
        parts: Mapping[str, QuantizedWeight],
        own: Mapping[str, str],
        tune_codes: bool,
    ) -> None:
        self.weights = {
            own[name]: TunableWeight(part, originals[name] if tune_codes else None) for name, part in parts.items()
        }
        self.norms = {
            f"{name}.weight": module.weight.detach()
            for name, module in block.named_modules()
            if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)
        }
        # Relative, so that one learning rate fits weights of any size.
        self.shifts = {
            name: nn.Parameter(torch.zeros_like(start, dtype=torch.float32)) for name, start in self.norms.items()
        }

    def groups(self, rates: Rates) -> list[dict[str, Any]]:
        """What moves, with its learning rate."""
        kinds: list[tuple[list[nn.Parameter], float]] = [
            ([weight.shift for weight in self.weights.values()], rates.scales),
            (list(self.shifts.values()), rates.norms),
            ([weight.position for weight in self.weights.values() if weight.position is not None], rates.codes),
        ]
        return [{"params": members, "lr": rate} for members, rate in kinds if members]

    def tensors(self) -> dict[str, Tensor]:
        """As functions of what moves, float32 or, of linears, the dtype of autocast."""
        return {name: weight() for name, weight in self.weights.items()} | self._moved()

    def clamp_(self) -> None:
        clamp_(self.weights.values())

    @torch.no_grad()
    def stored(self, dtype: torch.dtype) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Linears, and those norm weights that are stored otherwise than before."""
        norms = {name: moved.to(dtype) for name, moved in self._moved().items()}
        changed = {name: norm for name, norm in norms.items() if not torch.equal(norm, self.norms[name].to(dtype))}
        return {name: weight.quantized() for name, weight in self.weights.items()}, changed

    def _moved(self) -> dict[str, Tensor]:
        return {name: start.float() * (1 + self.shifts[name]) for name, start in self.norms.items()}


@torch.enable_grad()
def _learn(
    tunable: _Tunable,
    samples: _Samples,
    learnt: list[int],
    config: QuantizationConfig,
    progress: Callable[[int], None] | None,
    team: Team,
) -> None:
    stream, index, steps = samples.stream, samples.index, config.tune_block_steps
    device = stream.device
    batch = min(len(learnt), math.ceil(config.tune_batch / team.size))
    recorded = device.type == "cuda" and team.size == 1 and samples.alike(learnt, batch)
    groups = tunable.groups(Rates(config.tune_scale_rate, config.tune_scale_rate, config.tune_rate))
    rates = [group["lr"] for group in groups]
    if recorded:  # a recorded step reads its learning rates from the device
        groups = [group | {"lr": torch.tensor(group["lr"], device=device)} for group in groups]
    way: dict[str, bool] = {"fused": True} if device.type == "cuda" else {"foreach": True}
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12, capturable=recorded, **way)

    def gradients(x: Tensor, y: Tensor, lengths: tuple[int, ...], tokens: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=stream.dtype != torch.float32):
            found = stream.run_with(index, tunable.tensors(), x.float(), lengths)
        loss = relative_errors(found, y).sum() / tokens
        backward(loss)
        return loss.detach()

    def move() -> None:
        optimizer.step()
        tunable.clamp_()

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = gradients(x, y, (), batch * x.shape[1])
        move()
        return loss

    run = Replayed(step, optimizer, fall_back=True) if recorded else None
    with one_kernel_norms(stream.block_module(index)) if device.type == "cuda" else nullcontext():
        for number, places in enumerate(batches(len(learnt), batch, steps, seed=index), start=1):
            chosen = [learnt[place] for place in places.tolist()]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                _set_rate(group, rate * learning_rate(number - 1, steps))
            packs = samples.packs(chosen)
            if run is not None:
                run(*next(packs)[:2])
            else:
                tokens = sum(map(samples.length, chosen)) * team.size
                optimizer.zero_grad(set_to_none=True)
                for x, y, lengths in packs:
                    gradients(x, y, lengths, tokens)
                for group in optimizer.param_groups:
                    team.sum_(moving.grad for moving in group["params"] if moving.grad is not None)
                move()
            if progress is not None and (number % _TOLD == 0 or number == steps):
                progress(number)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    """Where the rate lies on the device it is written there, for a recorded step to read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@torch.no_grad()
def _error(
    weights: Mapping[str, QuantizedWeight],
    norms: Mapping[str, Tensor],
    samples: _Samples,
    judged: list[int],
    team: Team,
) -> tuple[float, int]:
    """(mean of `relative_errors` of the block with these weights, as it will run, samples) over the team's samples."""
    stream, index = samples.stream, samples.index
    tensors = {name: part.dequantize().to(stream.dtype) for name, part in weights.items()}
    tensors |= {name: norm.to(stream.dtype) for name, norm in norms.items()}
    tokens = sum(map(samples.length, judged))
    totals = torch.tensor([0.0, tokens, len(judged)], dtype=torch.float64, device=stream.device)
    for x, y, lengths in samples.packs(judged):
        totals[0] += relative_errors(stream.run_with(index, tensors, x, lengths), y).sum(dtype=torch.float64)
    team.sum_([totals])
    error, tokens, count = totals.tolist()
    return error / tokens, int(count)


def relative_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """‖found − wanted‖² / ‖wanted‖² of each token of [B, T, width], float32 [B, T]; 0 where nothing is wanted.

    Of each token, because some have outputs hundreds of times larger than others', and would decide alone.
    """
    size = torch.linalg.vector_norm(wanted, dim=-1, dtype=torch.float32).square()
    return (found.float() - wanted).square().sum(dim=-1) * torch.where(size > 0, 1 / size, 0)
