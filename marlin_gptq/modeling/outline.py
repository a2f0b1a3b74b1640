"""What a model is made of, from its config.json alone: shapes and settings, no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from marlin_gptq.config import QuantizationConfig
from marlin_gptq.modeling.architecture import (
    block_linears,
    decoder_blocks,
    known_names,
    read_config,
    require_divisible,
    require_full_precision,
)
from marlin_gptq.modeling.classes import empty_model, text_config
from marlin_gptq.modeling.names import usual_names

# Linears of one parent that read the same tensor; every other one has an input of its own.
_TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"})


@dataclass(frozen=True)
class LinearOutline:
    """A linear.

    input       a name that linears of one input share.
    group_size  None for one that stays in 16 bits.
    expert      it belongs to one of several experts.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    input: str
    group_size: int | None
    expert: bool


@dataclass(frozen=True)
class BlockOutline:
    """A decoder block: its linears in order, and its other tensors (norms, routers) by name and shape."""

    linears: tuple[LinearOutline, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def quantized(self) -> list[LinearOutline]:
        return [linear for linear in self.linears if linear.group_size is not None]

    @property
    def parameters(self) -> int:
        """Number of values of the full-precision block."""
        linears = sum(x.in_features * x.out_features + x.bias * x.out_features for x in self.linears)
        return linears + sum(torch.Size(shape).numel() for _, shape in self.others)


@dataclass(frozen=True)
class Outline:
    """A decoder model: blocks, tensors outside of them by name and shape, width of its activations, query heads.

    names  what settings may name: see `architecture.known_names`.
    """

    blocks: tuple[BlockOutline, ...]
    outer: tuple[tuple[str, tuple[int, ...]], ...]
    hidden: int
    experts_per_token: int
    heads: int
    names: tuple[list[str], list[str]]


def outline(model_dir: Path, settings: QuantizationConfig) -> Outline:
    """Read `model_dir`/config.json and nothing else. InputError for a model that cannot be quantized as asked."""
    config = read_config(model_dir)
    require_full_precision(model_dir, config)
    model = empty_model(config, torch.float32)
    prefix, blocks = decoder_blocks(model, config)
    usual = usual_names(model)
    made = tuple(_block(block, f"{prefix}.{index}", settings, usual) for index, block in enumerate(blocks))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    inside = {id(parameter) for parameter in blocks.parameters()}
    outer = [
        (name, tuple(parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in inside and name not in tied
    ]
    config = text_config(config)
    experts = getattr(config, "num_experts_per_tok", None) or 1
    heads = getattr(config, "num_attention_heads", None) or 1
    names = known_names(model, prefix, blocks)
    return Outline(made, tuple(outer), config.hidden_size, experts, heads, names)


def _block(block: nn.Module, prefix: str, settings: QuantizationConfig, usual: Callable[[str], str]) -> BlockOutline:
    chosen = block_linears(block, prefix, settings)
    require_divisible(chosen, settings)
    linears, covered = [], set()
    for own, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        name = f"{prefix}.{own}"
        covered |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        linears.append(
            LinearOutline(
                name=usual(f"{name}.weight").removesuffix(".weight"),
                in_features=module.in_features,
                out_features=module.out_features,
                bias=module.bias is not None,
                input=_input(name),
                group_size=settings.group_size_of(name) if name in chosen else None,
                expert=".experts." in name,
            )
        )
    others = [(f"{prefix}.{own}", tuple(tensor.shape)) for own, tensor in block.named_parameters()]
    return BlockOutline(tuple(linears), tuple((usual(name), shape) for name, shape in others if name not in covered))


def _input(name: str) -> str:
    parent, _, own = name.rpartition(".")
    for names in _TOGETHER:
        if own in names:
            return f"{parent}.{sorted(names)[0]}"
    return name
