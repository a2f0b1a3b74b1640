"""Which tensor of the files is which of a model: as transformers itself loads them, with its own renamings.

A model has one name for a tensor, files may have another: `block_sparse_moe.` for `mlp.`, `embed_out` for `lm_head`,
`language_model.model.` for `model.language_model.`, and files of a model without a head lack the prefix `model.`.
transformers keeps these renamings for each architecture; none of them is written down here again. What it merges or
splits when it loads a model, beyond the experts of a layer, is no renaming: such files are another form of the model.

Names of a model are those it has with its head: `model.layers.0.…` for an AutoModel's `layers.0.…` too, so that the
settings of a checkpoint mean the same layers whichever class loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from marlin_gptq.modeling.experts import Experts


def above(model: Any) -> str:
    """What stands before the names of a model without a head where it has one: `model.`, or nothing."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or getattr(model, prefix, None) is not None or model.get_output_embeddings() is not None:
        return ""
    return f"{prefix}."


class StoredNames:
    """The names `stored` in the files of `model`, whose experts are separate modules and whose blocks are in place.

    known      those of the files that the model has a place for.
    converted  those that transformers makes other tensors of, such as parts of a vision tower.
    """

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        conversions = get_model_conversion_mapping(model)
        self._renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
        self._converters = [one for one in conversions if isinstance(one, WeightConverter)]
        self._prefix, self._above = model.base_model_prefix, above(model)
        self._places: dict[str, bool] = dict.fromkeys(_places(model), True)
        self._stored: dict[str, str] = {}
        self.known: dict[str, str] = {}
        converted = set()
        for name in stored:
            here = self._renamed(name)
            if here in self._places:
                self.known[name] = self._above + here
                if here not in self._stored or name == here:
                    self._stored[here] = name
            elif self._is_converted(name):
                converted.add(name)
        self.converted = frozenset(converted)

    def stored(self, name: str) -> str | None:
        """What the files call the tensor that the model calls `name`; None if they have none of it."""
        return self._stored.get(name.removeprefix(self._above))

    def is_turned(self, stored: str, shape: Sequence[int], expected: Sequence[int]) -> bool:
        """Whether the files hold a 3-D tensor with its last two axes exchanged, and transformers turns it back."""
        if tuple(shape) == tuple(expected) or tuple(shape) != (expected[0], expected[2], expected[1]):
            return False
        here = self._plainly(stored)
        meant = [one for one in self._converters if one.rename_source_key(here)[1] is not None]
        return any(type(operation).__name__ == "Transpose" for one in meant for operation in one.operations)

    def module(self, name: str) -> str:
        """What the model calls the module whose tensors the files call `name`.…"""
        return self._above + self._renamed(f"{name}.weight").removesuffix(".weight")

    def written(self, name: str) -> str:
        """What to call the tensor `name` of a quantized linear in files: as they call the weight it comes from."""
        base, _, own = name.rpartition(".")
        there = self.stored(name) or self.stored(f"{base}.weight") or name
        if there.endswith(f".{own}"):
            return there
        candidate = f"{there.removesuffix('.weight')}.{own}"
        same = self._plainly(candidate).removesuffix(f".{own}") == self._plainly(there).removesuffix(".weight")
        return candidate if there.endswith(".weight") and same else name.removeprefix(self._above)

    def _plainly(self, name: str) -> str:
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def _renamed(self, name: str) -> str:
        """The model's own name, or the name itself where that is the model's."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self._renamings, [], self._prefix, self._places)
        if renamed not in self._places:
            plain, _ = rename_source_key(name, [], [], self._prefix, self._places)
            return plain if plain in self._places else renamed
        return renamed

    def _is_converted(self, name: str) -> bool:
        name = self._plainly(name)
        return any(converter.rename_source_key(name)[1] is not None for converter in self._converters)


def usual_names(model: Any) -> Callable[[str], str]:
    """A function from the model's name of a tensor to the one that files usually have: as `save_pretrained` writes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming) and not isinstance(one, PrefixChange)]
    backwards = [one.reverse_transform() for one in reversed(renamings)]

    def usual(name: str) -> str:
        for renaming in backwards:
            name, _ = renaming.rename_source_key(name)
        return name

    return usual


def _places(model: nn.Module) -> Iterator[str]:
    """Names of all parameters and persistent buffers, and of the tensors that files may hold experts in."""
    yield from model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield from (f"{name}.gate_up_proj", f"{name}.down_proj")
