"""The samples' way through a block whose linears are quantized one after the other, as one forward in stages.

Each pass goes up to the inputs of the linears that are solved next, and the one after them goes on from what it kept.
Of a Llama block, with what a token keeps behind each pass:

    pass   computes                    stops before   keeps
    1      norm                        q/k/v          nothing
    2      norm, q/k/v, attention      o              the input of o
    3      norm, o, sum, norm          gate/up        the output of attention
    4      norms, sums, gate/up        down           the output of attention, the input of down
    5      norms, sums, down           nothing        nothing

So linears and attention are computed once; norms and sums, which are cheap, each time. No architecture's forward is
written down here: a module whose part is done is stood in for by its kept output, and one that only its last linear is
missing of by that linear (staging.py finds out which these are). What is kept stays on the device: to bring it there
again from host memory or a disk would take about as long as to compute it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.experts import Enough
from marlin_gptq.modeling.packed import Packed


def enough(*_: object) -> None:
    """A hook that ends the forward."""
    raise Enough


@dataclass(frozen=True)
class Step:
    """What the passes of one stage keep; modules by their names in the block.

    finished  modules in which nothing changes any more: their outputs.
    tails     modules that return what one of their linears does → that linear, one of those to be solved: its input.
    """

    finished: frozenset[str] = frozenset()
    tails: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kept:
    """Of one pack, by name: outputs of modules, inputs of linears."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def drop_inside(self, module: str) -> None:
        for kept in (self.outputs, self.inputs):
            for name in [name for name in kept if name.startswith(f"{module}.")]:
                del kept[name]

    def drop(self) -> None:
        self.outputs.clear()
        self.inputs.clear()

    def tensors(self) -> list[Tensor]:
        return [*self.outputs.values(), *self.inputs.values()]


class Staged:
    """The samples of a block on their way through it, pack by pack.

    steps    one for each stage.
    returns  of each module in them: 0 for a tensor, n for a tuple of n whose first is one, and the others are not used.

    Iterating gives, for each pack, a function without arguments that runs the block on it as far as hooks let it.
    Passes of one stage may be repeated; `go_on` says that the linears of the stage have their final weights.
    """

    def __init__(
        self, stream: BlockStream, index: int, samples: Packed, steps: Sequence[Step], returns: Mapping[str, int]
    ) -> None:
        self.stream, self.index, self.samples = stream, index, samples
        self._block = stream.block_module(index)
        self._steps, self._returns = steps, returns
        self._stage = 0
        self._kept = [_Kept() for _ in samples.packs]

    def __iter__(self) -> Iterator[Callable[[], Tensor]]:
        return (
            partial(self._run, kept, hidden, lengths)
            for kept, (hidden, lengths) in zip(self._kept, self.samples, strict=True)
        )

    def go_on(self) -> None:
        """To the next stage or, behind the last one, the block's end."""
        self._stage += 1

    def advance(self) -> None:
        """Every sample becomes what the block makes of it; all its linears must have their final weights."""
        assert self._stage == len(self._steps), "linears are still to be solved"
        packs = iter(self._kept)

        def run(hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
            kept = next(packs)
            output = self._run(kept, hidden, lengths)
            kept.drop()
            return output

        self.samples.advance(run)

    def kept_bytes(self) -> int:
        """What waits for the next pass."""
        return sum(tensor.numel() * tensor.element_size() for kept in self._kept for tensor in kept.tensors())

    def _run(self, kept: _Kept, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
        step = self._steps[self._stage] if self._stage < len(self._steps) else Step()
        tails = {module: name for one in self._steps[: self._stage + 1] for module, name in one.tails.items()}
        with ExitStack() as entered:
            for name in {*kept.outputs, *step.finished, *tails}:
                stand_in = partial(self._stand_in, kept, name, tails.get(name, ""), name in step.finished)
                entered.enter_context(_standing_in(self._block.get_submodule(name), stand_in))
            for module, name in step.tails.items():  # before those hooks that end the forward
                linear = self._block.get_submodule(name)
                entered.callback(linear.register_forward_pre_hook(_keeping(kept, module, name), prepend=True).remove)
            return self.stream.run(self.index, hidden.to(self.stream.device), lengths)

    def _stand_in(self, kept: _Kept, name: str, tail: str, keeps: bool, forward: Callable[[], Any]) -> Any:
        """What module `name` returns; `forward` is its own, with the arguments of this call."""
        if name in kept.outputs:
            return self._returned(name, kept.outputs[name])
        if tail in kept.inputs:
            linear = self._block.get_submodule(tail)
            output = self._returned(name, linear(kept.inputs[tail]))
        else:
            output = forward()
        tensor = first_tensor(output)
        if keeps and tensor is not None and tensor.is_contiguous():
            kept.drop_inside(name)
            kept.outputs[name] = tensor
        return output

    def _returned(self, name: str, tensor: Tensor) -> Any:
        count = self._returns[name]
        return (tensor, *[None] * (count - 1)) if count else tensor


def advance(stream: BlockStream, index: int, samples: Packed | Staged) -> None:
    """Every sample becomes what block `index` makes of it."""
    if isinstance(samples, Staged):
        samples.advance()
    else:
        samples.advance(partial(stream.run, index))


def first_tensor(output: Any) -> Tensor | None:
    """What a module returned, a tensor or a tuple that begins with one; None if it was not so."""
    first = output[0] if type(output) is tuple and output else output
    return first if isinstance(first, Tensor) else None


@contextmanager
def _standing_in(module: nn.Module, stand_in: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Inside, calls of the module return what `stand_in` does of its own forward."""
    own = module.__dict__.get("forward")
    forward = module.forward
    module.__dict__["forward"] = lambda *args, **kwargs: stand_in(partial(forward, *args, **kwargs))
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _keeping(kept: _Kept, module: str, linear: str) -> Callable[[nn.Module, tuple], None]:
    def hook(_: nn.Module, args: tuple) -> None:
        if args[0].is_contiguous():
            kept.drop_inside(module)
            kept.inputs[linear] = args[0]

    return hook
