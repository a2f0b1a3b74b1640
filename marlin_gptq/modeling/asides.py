"""The model's own forward around its decoder blocks: what it makes for them, without running them.

Every block's place is taken by one that stands aside and hands its input on, or puts in what is wanted there. So
embeddings, masks, positions and rotary tables come from the model itself, whatever its architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.errors import InputError, MarlinGPTQError
from marlin_gptq.modeling.block_output import NOT_THERE, output_like
from marlin_gptq.modeling.packed import Arguments, kind_of

# Most memory for positions and masks that are kept from one pass of the samples to the next: rotary tables of 256
# documents of 2000 tokens, say. What does not fit is computed again each time.
_REMEMBERED_BYTES = 1 << 28
# Tokens that tell what a block returns.
_FEW = 2


class _Stop(Exception):
    """Raised inside the model's forward once the wanted tensor is there."""


def _stop(_: Tensor) -> Tensor:
    raise _Stop


class _Aside(nn.Module):
    """Stands where a decoder block stood: hands its input on, or what `hand_over` puts in its place.

    It returns a tensor, a tuple or a ModelOutput as blocks do: like the example that `asides` has. Attributes that a
    model asks of its blocks (attention_type, layer_idx, …) are answered by the absent block.
    """

    def __init__(self, block: nn.Module, asides: Asides) -> None:
        super().__init__()
        self.__dict__["absent"] = block  # not a submodule: its weights stay away
        self.__dict__["asides"] = asides
        self.__dict__["hand_over"] = None
        self.__dict__["recording"] = False
        self.__dict__["asked"] = None  # (args, kwargs) of the call while recording, without the hidden states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["absent"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        asides = self.__dict__["asides"]
        if any(argument is NOT_THERE for argument in (*args, *kwargs.values())):
            raise _unknown(asides.model, "hand each other more than hidden states")
        if self.__dict__["recording"]:
            self.__dict__["asked"] = (args, kwargs)
        replacement = self.__dict__["hand_over"]
        hidden = hidden_states if replacement is None else replacement(hidden_states)
        return output_like(asides.returned, hidden)


class Asides:
    """Takes the blocks of `model` out of `places`, its list of them; `blocks` are they, in order.

    returned  an example of what blocks return; None until `learn`, and taken for a tensor.
    """

    returned: Any = None
    _call: Arguments

    def __init__(self, model: Any, places: nn.ModuleList) -> None:
        self.model = model
        self.blocks = list(places)
        self._places = places
        self._asides = [_Aside(block, self) for block in self.blocks]
        for index, aside in enumerate(self._asides):
            places[index] = aside
        self._remembered: dict[tuple[int, ...], list[Arguments]] = {}
        self._remembered_bytes = 0
        # Of arguments of each length, for each block: what samples must have in common to share a pass.
        self._kinds: dict[int, list[Hashable | None]] = {}

    def enter(self, index: int) -> None:
        """Block `index` takes its place."""
        self._places[index] = self.blocks[index]

    def leave(self, index: int) -> None:
        self._places[index] = self._asides[index]

    def entered(self, index: int) -> bool:
        return self._places[index] is self.blocks[index]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, T] → what the model hands block 0."""
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            raise _Stop

        with self._handing_over(0, catch):
            self._forward(input_ids=ids)
        return caught[0]

    def require_plain(self, like: Tensor) -> None:
        """InputError for a model that makes something of each token for its blocks beside hidden states.

        like  has the dtype and the device of hidden states. What block 0 is handed is kept for `learn`.
        """
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden.detach())
            raise _Stop

        self._asides[0].__dict__["recording"] = True
        try:
            with self._handing_over(0, catch), torch.enable_grad():
                leaf = self._embedded(like.expand(1, _FEW)).requires_grad_()
                self._forward(inputs_embeds=leaf + 0)  # what a model may write into
            args, kwargs = self._asides[0].__dict__["asked"]
        except (ValueError, RuntimeError) as error:  # a model that looks the embedding's tokens up, for instance
            if isinstance(error, MarlinGPTQError):
                raise
            raise _unknown(self.model, "are not reached from embeddings alone") from error
        finally:
            self._asides[0].__dict__.update(recording=False, asked=None)
        if any(tensor.requires_grad for tensor in _tensors((args, kwargs))):
            raise _unknown(self.model, "get more of each token than its hidden state")
        self._call = (caught[0], *args), kwargs

    @torch.no_grad()
    def learn(self, index: int) -> None:
        """Find out what blocks return, from block `index`, which must have been entered."""
        args, kwargs = self._call
        try:
            self.returned = self.blocks[index](*args, **kwargs)
        except (ImportError, NotImplementedError, AssertionError) as error:
            said = " ".join(str(error).split())
            raise InputError(f"{type(self.model).__name__}: does not run on {args[0].device}: {said}") from error

    @contextmanager
    def leaving(self, hidden: Tensor) -> Iterator[Tensor]:
        """Inside, the last block's output is `hidden`; gives what the model is to be called with as inputs_embeds."""
        with self._handing_over(-1, lambda _: hidden):
            yield self._embedded(hidden)

    @torch.no_grad()
    def arguments(self, index: int, hidden: Tensor) -> Arguments:
        """What the model's own forward hands block `index` beside hidden states of this shape.

        One forward in which all blocks stand aside tells it for every block; it does not depend on the hidden states'
        values. It is kept for the next block and pass, as long as that takes little memory.
        """
        shape = tuple(hidden.shape[:2])
        if shape in self._remembered:
            return self._remembered[shape][index]
        place = self._places[index]
        self._places[index] = self._asides[index]
        for aside in self._asides:
            aside.__dict__["recording"] = True
        try:
            with self._handing_over(-1, _stop):
                self._forward(inputs_embeds=self._embedded(hidden))
            arguments = [aside.__dict__["asked"] for aside in self._asides]
            if passed_by := [number for number, asked in enumerate(arguments) if asked is None]:
                raise _unknown(self.model, f"are not all passed by text (not number {passed_by[0]})")
        finally:
            self._places[index] = place
            for aside in self._asides:
                aside.__dict__.update(recording=False, asked=None)
        if shape[0] == 1 and shape[1] not in self._kinds:
            self._kinds[shape[1]] = [kind_of(asked, shape[1]) for asked in arguments]
        size = _tensor_bytes(arguments)
        if self._remembered_bytes + size <= _REMEMBERED_BYTES:
            self._remembered[shape] = arguments
            self._remembered_bytes += size
        return arguments[index]

    def kind(self, index: int, like: Tensor) -> Hashable | None:
        """What samples with as many tokens as `like` [1, T, hidden_size] must have in common with others to share a
        pass through block `index`, None if they cannot."""
        length = like.shape[1]
        if length not in self._kinds:
            self.arguments(index, like)
        return self._kinds[length][index]

    def _embedded(self, like: Tensor) -> Tensor:
        """Zeros [B, T, width of the embedding], for `like` [B, T, …]: values that nothing here depends on."""
        return like.new_zeros(*like.shape[:2], self.model.get_input_embeddings().weight.shape[-1])

    def _forward(self, **inputs: Tensor) -> None:
        try:
            self.model(use_cache=False, **inputs)
        except _Stop:
            return
        raise InputError(f"{type(self.model).__name__}: its forward did not reach its decoder blocks; not understood")

    @contextmanager
    def _handing_over(self, index: int, replacement: Callable[[Tensor], Tensor]) -> Iterator[None]:
        aside = self._asides[index]
        aside.__dict__["hand_over"] = replacement
        try:
            yield
        finally:
            aside.__dict__["hand_over"] = None


def _unknown(model: nn.Module, what: str) -> InputError:
    return InputError(
        f"{type(model).__name__}: its decoder blocks {what}, so that they cannot be run one at a time; such models "
        "cannot be quantized or measured here"
    )


def _tensors(node: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, list | tuple | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _tensors(item)


def _tensor_bytes(tree: Any) -> int:
    """Memory of all tensors in it, each storage once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(tree)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
