"""A quantized directory opened: its settings, its architecture, its linears; nothing of it is trusted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlin_gptq.checkpoint import CheckpointWarning, TensorStore
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.conversion.layouts import layout_of
from marlin_gptq.conversion.linears import ZERO_CODE, StoredLinear
from marlin_gptq.conversion.reading import CODES, PARTS, Tensors, read_linear
from marlin_gptq.conversion.settings import Layout, stored_settings
from marlin_gptq.conversion.zero_points import with_version
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.model_directory import read_json
from marlin_gptq.modeling.architecture import decoder_blocks, read_config
from marlin_gptq.modeling.classes import empty_model
from marlin_gptq.modeling.names import StoredNames, above, usual_names

LARGEST_SIZE = 2**24  # of any dimension; a vocabulary of 16 million and a hidden size as large are not seen
SIZES = ("_size", "_dim", "_heads", "_layers", "_positions", "_ranks", "num_experts")
# What the constructors of transformers raise on values that they do not check.
_NO_MODEL = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Architecture:
    """What a model's config says about its linears, from a model without weights.

    config   transformers' config.
    modules  the model's name of every nn.Linear, by its name in the files (they differ in Mixtral), in the order of
             their definition. Experts are linears of their own, as in the files.
    shapes   their (out_features, in_features); this and what follows by the name in the files.
    biased   those with a bias.
    blocks   the model's name of the list of decoder blocks, and `stored_blocks` that of the files.
    """

    config: Any
    modules: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    biased: frozenset[str]
    blocks: str
    stored_blocks: str

    def in_blocks(self, name: str) -> bool:
        """Whether the linear is part of a decoder block."""
        return self.modules[name].startswith(f"{self.blocks}.")


def architecture(directory: Path, stored: Sequence[str]) -> Architecture:
    """The architecture of a model directory whose files hold the tensors of these names.

    Raises InputError for a config that transformers does not understand or whose sizes cannot be, before anything
    of those sizes is made.
    """
    require_possible(directory, read_json(directory / "config.json"), len(stored))
    try:
        config = read_config(directory)
        model = empty_model(config, torch.float16)
        blocks, _ = decoder_blocks(model, config)
        names = StoredNames(model, stored)
    except InputError:
        raise
    except _NO_MODEL as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{directory}/config.json: no model can be made of it: {said}") from error
    held = {names.module(base): base for base in dict.fromkeys(name.rpartition(".")[0] for name in stored)}
    usual, own = usual_names(model), above(model)
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stands = held.get(own + name) or usual(f"{name}.weight").removesuffix(".weight")
            linears[stands] = own + name, module
    first = ((name, stands) for stands, (name, _) in linears.items() if name.startswith(f"{blocks}."))
    name, stands = next(first, (blocks, blocks))
    return Architecture(
        config=config,
        modules={stands: name for stands, (name, _) in linears.items()},
        shapes={stands: (linear.out_features, linear.in_features) for stands, (_, linear) in linears.items()},
        biased=frozenset(stands for stands, (_, linear) in linears.items() if linear.bias is not None),
        blocks=blocks,
        stored_blocks=stands.removesuffix(name.removeprefix(blocks)),
    )


def require_possible(directory: Path, raw: dict[str, Any], tensors: int) -> None:
    """InputError for sizes of a config that no model has, and for more layers than there are tensors."""
    for key, value in _numbers({key: value for key, value in raw.items() if key != "quantization_config"}):
        if not key.endswith(SIZES) or isinstance(value, bool):
            continue
        if not abs(value) <= LARGEST_SIZE:  # NaN too
            raise InputError(f"{directory}/config.json: {key}: got {value!r:.40}, expected at most {LARGEST_SIZE}")
        if key == "num_hidden_layers" and value > tensors:
            raise InputError(
                f"{directory}/config.json: {key}: got {value}, but the files hold {tensors} tensors in all"
            )


def _numbers(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, int | float]]:
    if isinstance(content, dict) and depth < 20:
        for inner, value in content.items():
            yield from _numbers(value, str(inner), depth + 1)
    elif isinstance(content, list) and depth < 20:
        for value in content:
            yield from _numbers(value, key, depth + 1)
    elif isinstance(content, int | float):
        yield key, content


def _above(name: str) -> Iterator[str]:
    """`name` and the names of the modules that it is in: a.b.c, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


class Source:
    """A quantized model of any format: its tensors, and the directory of its config, tokenizer and so on.

    Opening compares names and headers; `linear` reads one linear. Raises InputError for what is not supported, by
    name, and CheckpointError for files that do not fit together.
    """

    def __init__(self, directory: Path, store: Tensors, settings: dict[str, Any], layout: Layout) -> None:
        self.directory = directory
        self.path = store.directory
        self.config = read_json(directory / "config.json")
        self.settings = settings
        self.layout = layout
        self.store = store
        self.architecture = architecture(directory, store.names)
        self.linears = self._linears()
        self._require_complete()
        self._require_understood()
        if not layout.declared:
            self.layout, doubt = with_version(store, self.linears, layout)
            if doubt is not None:
                warnings.warn(f"{self.path}: {doubt}", CheckpointWarning, stacklevel=2)

    @classmethod
    def of_directory(cls, directory: Path) -> Source:
        """A quantized model directory: Marlin, GPTQ, AWQ or compressed-tensors."""
        settings = stored_settings(directory, read_json(directory / "config.json"))
        if settings is None:
            raise InputError(f"{directory}: is not quantized; marlin-quantize makes a 4-bit model of it")
        try:
            layout = layout_of(settings)
        except InputError as error:
            raise InputError(f"{directory}: {error}") from error
        return cls(directory, TensorStore(directory), settings, layout)

    @cached_property
    def _quantized(self) -> frozenset[str]:
        return frozenset(self.linears)

    @cached_property
    def own(self) -> QuantizationConfig | None:
        """The settings, where they are ours."""
        return QuantizationConfig.from_dict(self.settings) if self.layout.format == "marlin" else None

    @property
    def kept(self) -> tuple[str, ...]:
        """Linears of the decoder blocks that are not quantized."""
        return tuple(
            name for name in self.architecture.shapes if self.architecture.in_blocks(name) and name not in self.linears
        )

    def linear(self, name: str, *, with_codes: bool = True) -> StoredLinear:
        """The quantized linear of this full name; zero points that are all 8 are None."""
        layout = self.layout
        if self.own is not None:
            layout = replace(layout, group_size=self.own.group_size_of(self.architecture.modules[name]))
        linear = read_linear(self.store, layout, name, *self.architecture.shapes[name], with_codes=with_codes)
        zeros = linear.weight.zeros
        if zeros is not None and bool((zeros == ZERO_CODE).all()):
            weight = linear.weight
            weight = type(weight)(weight.codes, weight.scales, None, weight.group_size)
            return StoredLinear(weight, linear.input_order)
        return linear

    def parts(self, name: str) -> list[str]:
        """Full names of the tensors that belong to the codes of a linear (not its bias)."""
        full = [f"{name}.{own}" for own in PARTS[self.layout.format]]
        return [one for one in full if one in self.store]

    def others(self) -> list[str]:
        """Names of the tensors that are not quantized, without zero biases that the architecture has no place for."""
        taken = {part for name in self.linears for part in self.parts(name)}
        return [name for name in self.store.names if name not in taken and not self._superfluous(name)]

    def _superfluous(self, name: str) -> bool:
        """Old tools wrote a bias of zeros beside every linear."""
        linear = name.removesuffix(".bias")
        if linear == name or linear not in self.linears or linear in self.architecture.biased:
            return False
        if bool(self.store.get(name).any()):
            raise CheckpointError(
                f"{name}: holds values, but {type(self.architecture.config).__name__} has no bias there"
            )
        return True

    def _linears(self) -> tuple[str, ...]:
        ending = f".{CODES[self.layout.format]}"
        held = {name.removesuffix(ending) for name in self.store.names if name.endswith(ending)}
        if not held:
            raise CheckpointError(
                f"{self.path}: holds no quantized linear (a tensor NAME{ending}), though its settings say "
                f"{self.layout.title}"
            )
        if strangers := sorted(held - set(self.architecture.shapes)):
            raise CheckpointError(
                f"{strangers[0]}{ending}: {type(self.architecture.config).__name__} has no linear of this name"
            )
        return tuple(name for name in self.architecture.shapes if name in held)

    def _require_understood(self) -> None:
        """InputError for a tensor of a quantized linear, or of the format, that nothing here knows the meaning of."""
        for name in self.others():
            base, _, own = name.rpartition(".")
            owner = next((above for above in _above(base) if above in self._quantized), None)
            if own in PARTS[self.layout.format] or (owner is not None and name != f"{owner}.bias"):
                raise InputError(
                    f"{name}: not understood: a quantized linear of {self.layout.title} has "
                    f"{', '.join(PARTS[self.layout.format])}, and what more there is may change what the model computes"
                )

    def _require_complete(self) -> None:
        tied = bool(getattr(self.architecture.config, "tie_word_embeddings", False))
        for name in self.architecture.shapes:
            if name in self.linears:
                if f"{name}.weight" in self.store:
                    raise CheckpointError(f"{name}: quantized and in 16 bits at once; only one may be there")
            elif f"{name}.weight" not in self.store and not (tied and not self.architecture.in_blocks(name)):
                raise CheckpointError(f"{name}.weight: missing from {self.path}; fetch the checkpoint again")
        for name in self.architecture.biased.intersection(self.linears):
            if f"{name}.bias" not in self.store:
                raise CheckpointError(f"{name}.bias: missing from {self.path}; fetch the checkpoint again")
