"""One block tuned by itself: from the inputs that it gets behind quantized blocks it learns to give the outputs that it
gives with its full-precision weights.

What the end-to-end tuning does for the whole model this does with one block on the device. Not the model's output is
kept but every block's (reconstruction of blocks: Li et al., BRECQ, arXiv 2102.05426; with all weights of a block
moving: Chen et al., EfficientQAT, arXiv 2407.11062; rounding by gradient: Cheng et al., AutoRound, arXiv 2309.05516).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.quantization.tunable import TunableWeight, clamp_
from marlin_gptq.quantization.weight import QuantizedWeight
from marlin_gptq.report import BlockRecord
from marlin_gptq.tuning.block_memory import TUNED_TOKENS
from marlin_gptq.tuning.end_to_end import BETAS, Rates, batches, learning_rate

# One in so many samples is kept aside to judge the result by.
_JUDGED = 16
# Steps between two reports of progress.
_TOLD = 10


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
    config: QuantizationConfig,
    target: torch.dtype,
    progress: Callable[[int], None] | None = None,
    together: int = TUNED_TOKENS,
) -> TunedBlock:
    """`config.tune_block_steps` steps of Adam on ‖block(x) − block₀(x)‖² / ‖block₀(x) − x‖², of a few samples x each.

    stream, index   the entered block, which must have its full-precision weights: they make the targets.
    originals, parts  of its quantized linears, by full name: the weights before, and codes and scales as solved.
    inputs          of the block, all samples; one in 16, or the only one, is kept aside to judge by.
    target          the dtype in which norm weights are stored.
    together        tokens of samples that pass the block together, unless one alone has more; 0 is one at a time.

    The block stays as it is. Samples come in an order given by the block's number, so that a run that is done again
    gives the same. The tuned block is to be kept only if its error on the samples kept aside is smaller, computed as
    the quantized block will run, with stored weights in the stream's dtype.
    """
    prefix = f"{stream.block_name(index)}."
    own = {name: f"{name.removeprefix(prefix)}.weight" for name in parts}
    samples = _Samples(stream, index, inputs, together)
    judged = list(range(0, len(samples), _JUDGED))
    learnt = [number for number in range(len(samples)) if number % _JUDGED] or judged
    before = _error({own[name]: part for name, part in parts.items()}, {}, samples, judged)
    tunable = _Tunable(stream.block_module(index), originals, parts, own, config.tune_codes)
    _learn(tunable, samples, learnt, config, progress)
    tuned, norms = tunable.stored(target)
    after = _error(tuned, norms, samples, judged)
    found = {name: tuned[own[name]] for name in parts}
    moved = sum(int((found[name].codes != part.codes).sum()) for name, part in parts.items())
    record = BlockRecord(
        block=index,
        error_before=before,
        error_after=after if math.isfinite(after) else None,
        kept=after < before,
        samples_judged=len(judged),
        codes_changed=moved / sum(part.codes.numel() for part in parts.values()),
    )
    return TunedBlock(found, norms, record)


def summary(record: BlockRecord) -> str:
    """For people."""
    after = "NaN" if record.error_after is None else f"{record.error_after:.5f}"
    return f"tuned: error {record.error_before:.5f} -> {after}" + ("" if record.kept else ", not kept")


class _Samples:
    """What passes the block: documents or, where they wait in batches, every window by itself; by number."""

    def __init__(self, stream: BlockStream, index: int, inputs: Activations, together: int) -> None:
        self.stream, self.index, self.inputs, self.together = stream, index, inputs, together
        self.places = [(position, row) for position, (rows, _) in enumerate(inputs.shapes) for row in range(rows)]

    def __len__(self) -> int:
        return len(self.places)

    def packs(self, chosen: list[int]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """(hidden states [1, ΣT, hidden_size], lengths) of those chosen that pass the block together."""
        places = [self.places[number] for number in chosen]
        lengths = [self.inputs.shapes[position][1] for position, _ in places]
        for pack in self.stream.packs(self.index, [(1, length) for length in lengths], self.together):
            parts = [self.inputs[position][row : row + 1] for position, row in places[pack.start : pack.stop]]
            yield torch.cat(parts, dim=1), tuple(lengths[pack.start : pack.stop])


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

    def groups(self, rates: Rates) -> list[dict[str, object]]:
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
) -> None:
    stream, index, steps = samples.stream, samples.index, config.tune_block_steps
    device = stream.device
    rates = Rates(config.tune_scale_rate, config.tune_scale_rate, config.tune_rate)
    way: dict[str, bool] = {"fused": True} if device.type == "cuda" else {"foreach": True}
    optimizer = torch.optim.Adam(tunable.groups(rates), betas=BETAS, eps=1e-12, **way)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    batch = min(len(learnt), config.tune_batch)
    for number, chosen in enumerate(batches(len(learnt), batch, steps, seed=index), start=1):
        packs = list(samples.packs([learnt[place] for place in chosen.tolist()]))
        wanted = [stream.run(index, x, lengths) for x, lengths in packs]
        change = sum(_squares(y, x) for (x, _), y in zip(packs, wanted, strict=True))
        optimizer.zero_grad(set_to_none=True)
        for (x, lengths), y in zip(packs, wanted, strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=stream.dtype != torch.float32):
                found = stream.run_with(index, tunable.tensors(), x.float(), lengths)
            (_squares(found, y) / change).backward()
        optimizer.step()
        schedule.step()
        tunable.clamp_()
        if progress is not None and (number % _TOLD == 0 or number == steps):
            progress(number)


@torch.no_grad()
def _error(
    weights: Mapping[str, QuantizedWeight], norms: Mapping[str, Tensor], samples: _Samples, judged: list[int]
) -> float:
    """Of the block with these weights, as it will run: Σ‖block(x) − block₀(x)‖² / Σ‖block₀(x) − x‖² over samples x."""
    stream, index = samples.stream, samples.index
    tensors = {name: part.dequantize().to(stream.dtype) for name, part in weights.items()}
    tensors |= {name: norm.to(stream.dtype) for name, norm in norms.items()}
    difference = change = 0.0
    for x, lengths in samples.packs(judged):
        y = stream.run(index, x, lengths)
        difference += float(_squares(stream.run_with(index, tensors, x, lengths), y, torch.float64))
        change += float(_squares(y, x, torch.float64))
    return difference / (change or 1.0)


def _squares(one: Tensor, other: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (one.float() - other.float()).square().sum(dtype=dtype)
