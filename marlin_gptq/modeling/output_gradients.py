"""What the loss makes of every block's outputs: gradients, for some samples, taken before anything is quantized.

The blocks are gone through once forwards, in full precision, and once backwards, one at a time on the device as ever:

    forwards   keeps each block's inputs
    head       tokens drawn from the model's own distribution are the targets: gradients of that cross-entropy have the
               Fisher matrix as their covariance, and that is the Hessian of the KL divergence from the model itself
    backwards  runs each block again from its inputs, and keeps the gradients by its outputs

When a block is quantized it is run through once more, and M of each of its linears is summed (`output_hessians`). To
sum all of them at once would take the square of every linear's outputs in memory, 40 GB for a 7B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.attention import backward
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.packed import Packed
from marlin_gptq.quantization.hessian import Cross, Hessian

# Tokens of samples whose gradients are taken: M has far fewer directions that matter than H, so that these are enough.
GRADIENT_TOKENS = 16_384
# Of those that pass a block together, unless one sample alone has more: a backward pass keeps all that was computed.
BACKWARD_TOKENS = 8192
# Of those whose logits are there together.
HEAD_TOKENS = 1024


@dataclass(frozen=True)
class OutputGradients:
    """Of the chosen samples, for every block: its inputs in full precision, and the gradients by its outputs.

    Both float32, or bfloat16 where the stream computes in 16 bits; gradients are of the sum over tokens. What is
    dropped is gone, and its memory with it.
    """

    inputs: dict[int, Activations]
    gradients: dict[int, Activations]

    @cached_property
    def prints(self) -> str:
        """As `Activations.digest`, of what was kept for all blocks; to be asked for before any is dropped."""
        return "".join(kept.digest() for kept in (*self.inputs.values(), *self.gradients.values()))

    def digest(self) -> str:
        return self.prints

    def drop(self, index: int) -> None:
        """Let go what is kept for block `index`."""
        self.inputs.pop(index, None)
        self.gradients.pop(index, None)


def chosen_samples(lengths: Sequence[int], tokens: int = GRADIENT_TOKENS) -> list[int]:
    """Positions of the first samples that have `tokens` tokens together, or of all: samples come in a random order."""
    chosen, found = [], 0
    for position, length in enumerate(lengths):
        if found >= tokens:
            break
        chosen.append(position)
        found += length
    return chosen


def output_gradients(
    stream: BlockStream,
    hidden: Activations,
    chosen: Mapping[int, int],
    make: Callable[[list[tuple[int, int]], torch.dtype], Activations],
    progress: Callable[[int, int], None] = lambda *_: None,
) -> OutputGradients:
    """Take them for some samples of `hidden`, the inputs of block 0.

    chosen    their positions → the seed of the tokens that are drawn for each.
    make      activations of these shapes and dtype, wherever they are to wait.
    progress  called with how many passes through a block are done, and how many there will be.
    """
    shapes = [hidden.shapes[position] for position in chosen]
    dtype = torch.float32 if stream.dtype == torch.float32 else torch.bfloat16
    states = make(shapes, dtype)
    for place, position in enumerate(chosen):
        states.put(place, hidden[position].to(dtype))
    inputs: dict[int, Activations] = {}
    count = stream.n_blocks
    for index in range(count):
        progress(index, 2 * count - 1)
        with stream.block(index):
            if index + 1 < count:
                stream.read_ahead(index + 1)
            packs = stream.packs(index, shapes, BACKWARD_TOKENS)
            inputs[index], states = states, make(shapes, dtype)
            for pack, (x, lengths) in zip(packs, Packed(inputs[index], packs), strict=True):
                with torch.no_grad():
                    states.put_joined(pack, _run(stream, index, x, lengths).to(dtype))
    gradients = {count - 1: _at_the_head(stream, states, make(shapes, dtype), list(chosen.values()))}
    for index in reversed(range(1, count)):
        progress(2 * count - 1 - index, 2 * count - 1)
        behind, before = gradients[index], make(shapes, dtype)
        with stream.block(index):
            stream.read_ahead(index - 1)
            packs = stream.packs(index, shapes, BACKWARD_TOKENS)
            for pack, gradient in zip(packs, _backwards(stream, index, inputs[index], behind, packs), strict=True):
                before.put_joined(pack, gradient.to(dtype))
        gradients[index - 1] = before
    progress(2 * count - 1, 2 * count - 1)
    return OutputGradients(inputs, gradients)


def output_hessians(
    stream: BlockStream,
    index: int,
    linears: dict[str, nn.Linear],
    kept: OutputGradients,
    add_up: Callable[[Iterable[Hessian | Cross]], None] = lambda _: None,
) -> dict[str, Tensor]:
    """M [out_features, out_features] of each linear of block `index`, which must have its full-precision weights.

    The block is run forwards and backwards on what was kept of it. add_up sums over processes.
    """
    found = {name: Hessian(linear.out_features, stream.device) for name, linear in linears.items()}
    inputs, gradients = kept.inputs[index], kept.gradients[index]
    packs = stream.packs(index, inputs.shapes, BACKWARD_TOKENS)
    with _watching(linears, found):
        for _ in _backwards(stream, index, inputs, gradients, packs):
            pass
    add_up(found.values())
    return {name: hessian.mean() for name, hessian in found.items()}


def _at_the_head(stream: BlockStream, states: Activations, gradients: Activations, seeds: Sequence[int]) -> Activations:
    """The gradients by the last block's outputs, `states`."""
    for position, (state, seed) in enumerate(zip(states, seeds, strict=True)):
        generator = torch.Generator(stream.device).manual_seed(seed)
        rows = [[_drawn(stream, part, generator) for part in row.split(HEAD_TOKENS, dim=1)] for row in state.split(1)]
        gradients.put(position, torch.cat([torch.cat(parts, dim=1) for parts in rows]).to(gradients.dtype))
    stream.release()
    return gradients


def _drawn(stream: BlockStream, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradients by hidden states [1, T, hidden_size] of the cross-entropy of tokens drawn from their own logits."""
    x = hidden.detach().requires_grad_()
    with torch.enable_grad(), _computing(stream):
        logits = stream.head(x)
    likely = torch.softmax(logits.detach()[0].float(), dim=-1)
    drawn = torch.multinomial(likely, 1, generator=generator)
    likely.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=likely.dtype))  # that by the logits
    logits.backward(likely.to(logits.dtype)[None])
    assert x.grad is not None
    return x.grad


def _backwards(
    stream: BlockStream, index: int, inputs: Activations, gradients: Activations, packs: list[range]
) -> Iterator[Tensor]:
    """The gradients by the inputs of block `index`, pack by pack, from those by its outputs."""
    for (x, lengths), (gradient, _) in zip(Packed(inputs, packs), Packed(gradients, packs), strict=True):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            output = _run(stream, index, x, lengths)
        backward(output, gradient.to(output.dtype))
        assert x.grad is not None
        yield x.grad


def _run(stream: BlockStream, index: int, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Block `index` in float32 with products in bfloat16, whose range gradients need, unless the stream is exact."""
    with _computing(stream):
        return stream.run_with(index, {}, x.float(), lengths)


def _computing(stream: BlockStream) -> torch.autocast:
    return torch.autocast(stream.device.type, torch.bfloat16, enabled=stream.dtype != torch.float32)


@contextmanager
def _watching(linears: dict[str, nn.Linear], found: dict[str, Hessian]) -> Iterator[None]:
    """Inside, the gradients by each linear's outputs go into its Hessian."""

    def watch(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(found[name].add)

        return hook

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
