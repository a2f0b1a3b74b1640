"""Several samples as one sequence: fewer and fuller passes through a block, with the results of each sample alone.

Samples of 3, 2 and 4 tokens go through a block as hidden states [1, 9, hidden_size]:

    sample     0 0 0 1 1 2 2 2 2
    position   0 1 2 0 1 0 1 2 3     each sample's own arguments, one behind the other
    attention  0..2  3..4  5..8      the model's own attention function, once for each sample's tokens

Linears, norms and activations take every token for itself and see one long sequence. No architecture's forward is
written down here: what the model hands its block for each sample alone is joined, and transformers' AttentionInterface
lets another attention function stand in for the model's. Whether that is right for a block is tried out, see
`mistake`; samples whose arguments are not understood (a mask because of a sliding window, say) stay alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.modeling.activations import Activations
from marlin_gptq.modeling.attention import implementation, sdpa_configs

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# Tokens of a pack at most, unless one sample alone has more: linears are as fast per token as with any number from
# there on, and the memory of a pack's forward stays below that of factoring a Hessian.
PACK_TOKENS = 8192
# Samples of different lengths that `mistake` tries; it judges the middle one.
PROBE_LENGTHS = (2, 3, 2)

_NAME = "marlin_gptq_packed"
_IGNORED_BY_SDPA = {"position_ids", "cache_position"}
_bounds: ContextVar[tuple[int, ...]] = ContextVar("bounds")


class NotPackable(RuntimeError):
    """A block's attention asks for something that cannot be cut at the bounds of samples."""


@dataclass(frozen=True)
class Packed:
    """The samples of `activations` in packs, each a range of consecutive positions.

    Iterating gives (hidden states [B, T, width] on the device, lengths of the samples in them): what `BlockStream.run`
    takes.
    """

    activations: Activations
    packs: list[range]

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        return ((self.activations.joined(pack), self._lengths(pack)) for pack in self.packs)

    def advance(self, run: Callable[[Tensor, tuple[int, ...]], Tensor]) -> None:
        """Every sample becomes what `run` makes of it."""
        for pack in self.packs:
            self.activations.put_joined(pack, run(self.activations.joined(pack), self._lengths(pack)))

    def _lengths(self, pack: range) -> tuple[int, ...]:
        return tuple(self.activations.shapes[position][1] for position in pack)


def packs_of(lengths: Sequence[int], kinds: Sequence[Hashable | None], tokens: int) -> list[range]:
    """Consecutive samples together, greedily, up to `tokens` or the longest sample, whichever is more.

    kinds  of each sample: only samples of equal kinds share a pack; None stays alone.
    """
    most = max(tokens, *lengths, 0)
    packs: list[range] = []
    used = 0
    for position, (length, kind) in enumerate(zip(lengths, kinds, strict=True)):
        if packs and kind is not None and kind == kinds[position - 1] and used + length <= most:
            packs[-1] = range(packs[-1].start, position + 1)
            used += length
        else:
            packs.append(range(position, position + 1))
            used = length
    return packs


def kind_of(arguments: Arguments, length: int) -> Hashable | None:
    """What the arguments of samples must have in common to be joined; None if those of this one cannot be.

    Understood are tensors with one vector or number per token, [1, length, …] or [length], no masks, and plain values,
    which must be equal. The model hands a mask only to samples for which attending to all tokens before is not the
    whole truth.
    """

    def kind(name: str, node: Any) -> Hashable:
        if isinstance(node, Tensor):
            per_token = node.shape == (length,) or (node.dim() in (2, 3) and node.shape[:2] == (1, length))
            if not per_token or "mask" in name or node.dtype == torch.bool:
                raise NotPackable
            return "tensor", node.dim(), node.dtype
        if isinstance(node, list | tuple):
            return tuple(kind(name, item) for item in node)
        if isinstance(node, dict):
            return tuple((key, kind(str(key), item)) for key, item in node.items())
        if node is None or isinstance(node, bool | int | float | str):
            return type(node).__name__, node
        raise NotPackable

    try:
        return kind("", arguments)
    except NotPackable:
        return None


def joined_arguments(arguments: Sequence[Arguments]) -> Arguments:
    """The arguments of samples of one kind as those of their pack."""

    def join(nodes: Sequence[Any]) -> Any:
        first = nodes[0]
        if isinstance(first, Tensor):
            return torch.cat(list(nodes), dim=0 if first.dim() == 1 else 1)
        if isinstance(first, list | tuple):
            return tuple(join(items) for items in zip(*nodes, strict=True))
        if isinstance(first, dict):
            return {key: join([node[key] for node in nodes]) for key in first}
        return first

    args, kwargs = join(arguments)
    return args, kwargs


def bounds_of(lengths: Sequence[int]) -> tuple[int, ...]:
    """(0, T₀, T₀ + T₁, …)."""
    return tuple(accumulate(lengths, initial=0))


def lengths_now(tokens: int) -> tuple[int, ...]:
    """Those of the samples in the pass that is running, `tokens` tokens in all: of a pack, or of one sample alone."""
    return tuple(stop - start for start, stop in pairwise(_bounds.get((0, tokens))))


@contextmanager
def within_samples(block: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Inside, attention of `block` stays within the samples of these lengths.

    NotPackable if its attention is not the one that transformers builds on torch's scaled_dot_product_attention.
    """
    from transformers import AttentionInterface

    configs = sdpa_configs(block)
    if not configs:
        raise NotPackable("its attention is not transformers' sdpa")
    AttentionInterface.register(_NAME, _attention)
    token = _bounds.set(bounds_of(lengths))
    try:
        with implementation(_NAME, configs):
            yield
    finally:
        _bounds.reset(token)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa for the tokens of one sample after the other; [1, heads, T, …] in, [1, T, heads, …] out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    bounds = _bounds.get()
    strange = [name for name, option in options.items() if isinstance(option, Tensor) and name not in _IGNORED_BY_SDPA]
    if attention_mask is not None or strange:
        raise NotPackable(f"its attention takes {'a mask' if attention_mask is not None else strange[0]}")
    if {query.shape[2], key.shape[2], value.shape[2]} != {bounds[-1]}:
        raise NotPackable(f"its attention sees {key.shape[2]} keys for {bounds[-1]} tokens")
    parts = [
        sdpa_attention_forward(
            module, query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], None, **options
        )[0]
        for start, stop in pairwise(bounds)
    ]
    return torch.cat(parts, dim=1), None


def mistake(run: Callable[[Tensor, tuple[int, ...]], Tensor], width: int, dtype: torch.dtype) -> str | None:
    """What goes wrong when samples share a pass through the block that `run` runs, None if nothing does.

    run  (hidden states [1, ΣT, width], lengths) → hidden states; with one length, the sample alone.

    NaN in the samples before and behind must not reach the one between them: nothing crosses the bounds then, whatever
    the weights. And that sample must come out as it does alone, but for rounding.
    """
    probe = torch.randn(1, sum(PROBE_LENGTHS), width, generator=torch.Generator().manual_seed(0)).to(dtype)
    start, stop = bounds_of(PROBE_LENGTHS)[1:3]
    middle = probe[:, start:stop]
    fenced = torch.full_like(probe, torch.nan)
    fenced[:, start:stop] = middle
    try:
        alone = run(middle, PROBE_LENGTHS[1:2]).float().cpu()
        lonely = run(fenced, PROBE_LENGTHS)[:, start:stop]
        together = run(probe, PROBE_LENGTHS)[:, start:stop].float().cpu()
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    if not bool(torch.isfinite(lonely).all()):
        return "tokens of one sample reach another"
    allowed = 0.02 * (alone - middle.float()).norm() + 4 * torch.finfo(dtype).eps * alone.norm()
    if not bool((together - alone).norm() <= allowed):
        return "samples come out otherwise than alone"
    return None


def make_of(block: nn.Module) -> Hashable:
    """What tells blocks apart that may treat samples otherwise: their modules, with plain attributes but the number."""

    def plain(module: nn.Module) -> Hashable:
        known = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        return tuple(sorted((key, repr(value)) for key, value in known.items() if key != "layer_idx"))

    return tuple((name, type(module), plain(module)) for name, module in block.named_modules())
