"""Mixture-of-experts layers as one linear per expert and projection, whatever transformers or the files hold.

transformers keeps the experts of a layer as two 3-D parameters, gate_up_proj [experts, 2·inner, hidden] and down_proj
[experts, hidden, inner], and most checkpoints one matrix per expert and projection:

    Mixtral     block_sparse_moe.experts.3.w1.weight (gate), .w3 (up), .w2 (down)
    Qwen-MoE    mlp.experts.3.gate_proj.weight, .up_proj, .down_proj

Here each expert becomes a module with three nn.Linear of the names in the files, so that experts are calibrated,
quantized, stored and loaded like every other linear. The router stays what it was: its choice is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.errors import InputError

# Names of gate, up and down in the files of some model types; all others follow Qwen-MoE.
_W_NAMES = ("w1", "w3", "w2")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_NAMES = {"mixtral": _W_NAMES, "minimax": _W_NAMES, "minimax_m2": _W_NAMES, "phimoe": _W_NAMES}
# What the files of these model types call a module that transformers calls otherwise.
_FILE_PREFIX = {name: (".mlp.", ".block_sparse_moe.") for name in _NAMES}


class Enough(Exception):
    """Raised by a hook inside a forward of which all has been seen that was to be seen."""


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)) for x [tokens, hidden]; the projections are named as in the files."""

    def __init__(self, names: tuple[str, str, str], linears: list[nn.Linear], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names = names
        self.act = act
        for name, linear in zip(names, linears, strict=True):
            self.add_module(name, linear)

    def inner(self, x: Tensor) -> Tensor:
        """The input of the down projection, [tokens, inner]."""
        gate, up, _ = (self.get_submodule(name) for name in self.names)
        return self.act(gate(x)) * up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.names[2])(self.inner(x))


class Experts(nn.Module):
    """The experts of one layer, by number; called as transformers calls its own."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> Expert:
        expert = self._modules[str(index)]
        assert isinstance(expert, Expert)
        return expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, chosen] → [tokens, hidden].

        Each expert sees the tokens routed to it in one call; an expert without tokens is not called. One that a hook
        stops, with `Enough`, adds nothing.
        """
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        output = torch.zeros_like(hidden_states)
        start = 0
        for index, count in enumerate(counts[: len(self)]):
            places = order[start : start + count]
            start += count
            if count:
                tokens = places // top_k_index.shape[1]
                weights = top_k_weights.flatten()[places].unsqueeze(1)
                # A token chooses an expert once at most: no two rows of this sum meet, so it has one result.
                with suppress(Enough):
                    output.index_add_(0, tokens, (self[index](hidden_states[tokens]) * weights).to(output.dtype))
        return output


def separate_experts(model: nn.Module, config: Any) -> None:
    """Put `Experts` (on meta) in place of every module with fused 3-D expert weights; done again it does nothing.

    InputError for experts of another form than silu(gate)·up, concatenated, without bias.
    """
    for name, module in list(model.named_modules()):
        fused = dict(module.named_parameters(recurse=False))
        if "gate_up_proj" in fused and "down_proj" in fused and fused["gate_up_proj"].dim() == 3:
            _require_understood(name, module, fused)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _separated(module, fused, _names(config)))


def file_name(name: str, config: Any) -> str:
    """What the files call the tensor (or module) that the model calls `name`."""
    here, there = _FILE_PREFIX.get(getattr(config, "model_type", ""), ("", ""))
    return name.replace(here, there) if here else name


def fused_source(name: str, config: Any, shape: Sequence[int]) -> tuple[str, tuple[int, slice]] | None:
    """Where files with fused experts hold the tensor `….experts.3.up_proj.weight`: (tensor, (expert, rows)).

    `shape` is its own. None if `name` is no weight of an expert.
    """
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
    names = _names(config)
    if not found or found[3] not in names:
        return None
    position = names.index(found[3])
    rows = slice(None) if position == 2 else slice(position * shape[0], (position + 1) * shape[0])
    return f"{found[1]}.{'down_proj' if position == 2 else 'gate_up_proj'}", (int(found[2]), rows)


def expert_lists(block: nn.Module) -> dict[str, Experts]:
    """The experts inside a block, by the name of their list within it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}


def routing_modules(block: nn.Module) -> set[str]:
    """Names of the modules that route or weigh tokens: beside a list of experts, with parameters of their own, or a
    linear further inside that gives a number for each expert."""
    routing = set()
    for name, experts in expert_lists(block).items():
        parent = name.rpartition(".")[0]
        for child, sibling in block.get_submodule(parent).named_children():
            for own, module in sibling.named_modules(prefix=f"{parent}.{child}" if parent else child):
                if module is experts:
                    break
                routes = module is sibling or getattr(module, "out_features", None) == len(experts)
                if routes and any(True for _ in module.parameters(recurse=False)):
                    routing.add(own)
    return routing


def _names(config: Any) -> tuple[str, str, str]:
    return _NAMES.get(getattr(config, "model_type", ""), _PROJECTIONS)


def _require_understood(name: str, module: nn.Module, fused: dict[str, nn.Parameter]) -> None:
    expected = {"is_concatenated": True, "is_transposed": False, "has_bias": False, "has_gate": True}
    expected |= {"has_post_expert_norm": False}
    odd = [key for key, value in expected.items() if getattr(module, key, value) != value]
    (experts, both, hidden), down = fused["gate_up_proj"].shape, tuple(fused["down_proj"].shape)
    if odd or set(fused) != {"gate_up_proj", "down_proj"} or down != (experts, hidden, both // 2):
        raise InputError(
            f"{name}: the experts of a {type(module).__name__} are not understood ({', '.join(odd) or 'shapes'}); "
            "gate, up and down projections without bias, as in Mixtral and Qwen-MoE, are needed"
        )


def _separated(module: nn.Module, fused: dict[str, nn.Parameter], names: tuple[str, str, str]) -> Experts:
    experts, both, hidden = fused["gate_up_proj"].shape
    inner, dtype = both // 2, fused["gate_up_proj"].dtype
    act: Any = module.act_fn

    def linear(in_features: int, out_features: int) -> nn.Linear:
        made = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device="meta")
        return made.requires_grad_(False)

    return Experts(
        [
            Expert(names, [linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)], act)
            for _ in range(experts)
        ]
    )
