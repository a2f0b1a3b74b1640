"""What each token of a pass weighs where every sample is to weigh the same: also in packs, and behind a router."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.experts import Experts, routed
from marlin_gptq.quantization.hessian import equal_samples


class SampleWeights:
    """The weights of the tokens on their way through a block, as each of its linears sees them.

    experts  full name of every expert's linear → the list it is in and its number there. Their weights are those of the
             tokens that the router sends them, which `hooks` note.
    """

    def __init__(self, experts: dict[str, tuple[Experts, int]]) -> None:
        self._experts = experts
        self._tokens = torch.empty(0)
        self._routed: dict[tuple[int, int], Tensor] = {}
        lists = {id(one): one for one, _ in experts.values()}.values()
        self.hooks = [one.register_forward_pre_hook(self._note) for one in lists]

    def over(self, samples: Iterable[tuple[Tensor, tuple[int, ...]]]) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The same samples or packs, [B, T, width] and lengths; the weights are those of the last one taken."""
        for hidden, lengths in samples:
            self._tokens = equal_samples(lengths or hidden.shape[1:2], len(hidden), hidden.device)
            yield hidden, lengths

    def of(self, name: str, inputs: Tensor) -> Tensor:
        """float32 [vectors], for inputs [..., features] of the linear `name`, or of what sees all tokens.

        InputError if there are not as many vectors as tokens, which so cannot be told from one another.
        """
        weights = self._tokens
        if name in self._experts:
            experts, number = self._experts[name]
            weights = self._routed[id(experts), number]
        vectors = inputs.numel() // inputs.shape[-1]
        if len(weights) != vectors:
            raise InputError(
                f"equal_samples: {name} got {vectors} vectors for {len(weights)} tokens, so that they cannot be told "
                "apart by sample; use --no-equal-samples"
            )
        return weights.to(inputs.device)

    def _note(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(experts, Experts)
        _, chosen, _ = args
        for number, places in routed(chosen, len(experts)):
            tokens = places // chosen.shape[1]
            self._routed[id(experts), number] = self._tokens.to(tokens.device)[tokens]
