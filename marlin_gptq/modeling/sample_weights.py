"""What each token of a pass weighs where every sample is to weigh the same: also in packs, and behind a router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.experts import Experts
from marlin_gptq.modeling.packed import lengths_now
from marlin_gptq.quantization.hessian import equal_samples


class SampleWeights:
    """The weights of the tokens on their way through `block`, as each of its linears sees them.

    experts  full name of every expert's linear → the list it is in, its number there, and more. Their weights are those
             of the tokens that the router sends them.
    hooks    what watches the block; to be removed when no more is to be weighed.
    """

    def __init__(self, block: nn.Module, experts: Mapping[str, tuple[Experts, int, Any]]) -> None:
        self._experts = experts
        self._tokens = torch.empty(0)
        self._chosen: dict[int, Tensor] = {}
        self.hooks = [block.register_forward_pre_hook(self._begin)]
        for one in {id(one): one for one, *_ in experts.values()}.values():
            self.hooks.append(one.register_forward_pre_hook(self._note))

    def of(self, name: str, inputs: Tensor) -> Tensor:
        """float32 [vectors], for inputs [..., features] of the linear `name`, or of what sees all tokens.

        InputError if there are not as many vectors as tokens, which so cannot be told from one another.
        """
        weights = self._tokens
        if name in self._experts:
            experts, number, *_ = self._experts[name]
            # A token chooses an expert once at most, and they come in their order: see `Experts.forward`.
            weights = weights[(self._chosen[id(experts)] == number).any(dim=1)]
        vectors = inputs.numel() // inputs.shape[-1]
        if len(weights) != vectors:
            raise InputError(
                f"equal_samples: {name} got {vectors} vectors for {len(weights)} tokens, so that they cannot be told "
                "apart by sample; use --no-equal-samples"
            )
        return weights

    def _begin(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        hidden = args[0]  # [B, T, width]
        self._tokens = equal_samples(lengths_now(hidden.shape[1]), len(hidden), hidden.device)

    def _note(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        self._chosen[id(experts)] = args[1]
