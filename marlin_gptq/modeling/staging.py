"""How a block can be run in stages (staged.py): which of its modules are done when, as a run of one sample shows.

Nothing is known of an architecture here. A module may be stood in for by its output if it ran once, returned a tensor
that nobody wrote into, and all linears that ran until then have their final weights. (Of a tuple the first is meant:
attention returns its weights beside it, of which a block makes no use.) Whether stages come to what the block does in
one go is tried out on that sample, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor, nn

from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.experts import Enough, Expert, expert_lists
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.modeling.staged import Staged, Step, enough, first_tensor

# Of a sample, for the trial.
_TOKENS = 64


@dataclass(frozen=True)
class Staging:
    """The stages of a block: see `Staged`."""

    steps: tuple[Step, ...]
    returns: Mapping[str, int]

    def of(self, stream: BlockStream, index: int, samples: Packed) -> Staged:
        return Staged(stream, index, samples, self.steps, self.returns)


@dataclass
class _Seen:
    """Of one run: when modules with linears inside began and ended, by their names in the block, and what they gave."""

    began: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, object] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    time: int = 0

    def begin(self, name: str, args: tuple) -> None:
        self.time += 1
        if name in self.began:
            self.again.add(name)
        self.began.setdefault(name, self.time)
        if args and isinstance(args[0], Tensor):
            self.inputs[name] = args[0]

    def end(self, name: str, output: object) -> None:
        self.time += 1
        self.ended[name] = self.time
        self.outputs[name] = output
        tensor = first_tensor(output)
        self.versions[name] = -1 if tensor is None else tensor._version

    def replaceable(self) -> set[str]:
        """The modules that ran once and whose output is a whole tensor and was left as it is."""
        found = set()
        for name in self.ended.keys() - self.again:
            tensor = first_tensor(self.outputs[name])
            if tensor is not None and tensor.is_contiguous() and tensor._version == self.versions[name]:
                found.add(name)
        return found


@torch.no_grad()
def staging(stream: BlockStream, index: int, stages: Sequence[list[list[str]]], sample: Tensor) -> Staging | None:
    """How block `index`, which must have been entered, is run in these stages; None if the trial fails.

    stages  of groups of linears, by full name, as `observe.stages` gives them.
    sample  hidden states [B, T, hidden_size] to try it with; few of them are taken.
    """
    block, prefix = stream.block_module(index), f"{stream.block_name(index)}."
    own = [[[name.removeprefix(prefix) for name in group] for group in stage] for stage in stages]
    sample = sample[:1, :_TOKENS].contiguous()
    seen, output = _watched(stream, index, sample)
    found = _steps(block, own, seen)
    try:
        agrees = _agrees(stream, index, own, found, sample, seen.inputs, output)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # something was asked of what is missing
        agrees = False
    return found if agrees else None


def _watched(stream: BlockStream, index: int, sample: Tensor) -> tuple[_Seen, Tensor]:
    block, seen = stream.block_module(index), _Seen()
    lists = expert_lists(block)
    inside = tuple(f"{name}." for name in lists)  # which of them run depends on the tokens
    with ExitStack() as entered:
        for name, module in block.named_modules():
            if name and not name.startswith(inside or "\0") and any(isinstance(m, nn.Linear) for m in module.modules()):
                hooks = (
                    module.register_forward_pre_hook(lambda _, args, name=name: seen.begin(name, args)),
                    module.register_forward_hook(lambda _, args, output, name=name: seen.end(name, output)),
                )
                for hook in hooks:
                    entered.callback(hook.remove)
        output = stream.run(index, sample)
    return seen, output


def _steps(block: nn.Module, stages: list[list[list[str]]], seen: _Seen) -> Staging:
    experts = expert_lists(block)
    replaceable = seen.replaceable()
    stage_of = {name: number for number, stage in enumerate(stages) for group in stage for name in group}

    def first_run(name: str) -> float:
        """When the linear ran, or began the experts that it is of."""
        lists = [owner for owner in experts if name.startswith(f"{owner}.")]
        return seen.began.get(lists[0] if lists else name, inf)

    steps = []
    for number, stage in enumerate(stages):
        limit = min(first_run(name) for name, its_stage in stage_of.items() if its_stage >= number)
        tails: dict[str, str] = {}
        later = {name for name, its_stage in stage_of.items() if its_stage > number}
        for group in stage:
            tails |= _tail(block, group, seen, replaceable, limit, later)
        finished = {name for name in replaceable if seen.ended[name] < limit}
        finished = {name for name in finished if not any(above in finished or above in tails for above in _above(name))}
        steps.append(Step(frozenset(finished), tails))
    names = {name for step in steps for name in (*step.finished, *step.tails)}
    counts = {name: seen.outputs.get(name) for name in names}
    return Staging(tuple(steps), {name: len(x) if isinstance(x, tuple) else 0 for name, x in counts.items()})


def _tail(
    block: nn.Module, group: list[str], seen: _Seen, replaceable: set[str], limit: float, later: set[str]
) -> dict[str, str]:
    """The largest module that returns what the only linear of this group does, if only that is still missing of it."""
    if len(group) != 1:
        return {}
    name = group[0]
    expert, _, own = name.rpartition(".")
    module = block.get_submodule(expert)
    if isinstance(module, Expert):  # known to return what its down projection does, whether it ran or not
        return {expert: name} if own == module.names[2] and len(expert_lists(block)) == 1 else {}
    if seen.began.get(name) != limit or name not in replaceable or not seen.inputs[name].is_contiguous():
        return {}
    output = first_tensor(seen.outputs[name])
    for above in _above(name):
        complete = not any(other.startswith(f"{above}.") for other in later)
        if above in replaceable and complete and first_tensor(seen.outputs[above]) is output:
            return {above: name}
    return {}


def _above(name: str) -> Iterator[str]:
    """The modules around this one, the largest first."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def _agrees(
    stream: BlockStream,
    index: int,
    stages: list[list[list[str]]],
    found: Staging,
    sample: Tensor,
    inputs: Mapping[str, Tensor],
    output: Tensor,
) -> bool:
    """Whether the linears of every stage see, and the block returns, to the bit what they do in one run."""
    block = stream.block_module(index)
    states = Activations([(1, sample.shape[1])], sample.shape[2], sample.dtype, stream.device)
    states.put(0, sample)
    staged = found.of(stream, index, Packed(states, [range(1)]))
    arrived: dict[str, Tensor] = {}
    for stage in stages:
        wanted = [group[0] for group in stage if group[0] in inputs]  # none, of experts
        with ExitStack() as entered:
            for name in wanted:
                linear = block.get_submodule(name)
                hook = linear.register_forward_pre_hook(lambda _, args, name=name: arrived.__setitem__(name, args[0]))
                entered.callback(hook.remove)
            if wanted:
                entered.callback(block.get_submodule(wanted[-1]).register_forward_pre_hook(enough).remove)
            for run in staged:
                with suppress(Enough):
                    run()
        if any(name not in arrived or not torch.equal(arrived[name], inputs[name]) for name in wanted):
            return False
        staged.go_on()
    staged.advance()
    return torch.equal(states[0], output)
