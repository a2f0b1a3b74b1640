"""Mixture-of-experts layers as one linear per expert and projection, whatever transformers or the files hold.

transformers keeps the experts of a layer as two 3-D parameters, gate_up_proj [experts, 2·inner, hidden] and down_proj
[experts, hidden, inner], and most checkpoints one matrix per expert and projection:

    Mixtral     block_sparse_moe.experts.3.w1.weight (gate), .w3 (up), .w2 (down)
    Qwen-MoE    mlp.experts.3.gate_proj.weight, .up_proj, .down_proj

Here each expert becomes a module with three nn.Linear of the names in the files, so that experts are calibrated,
quantized, stored and loaded like every other linear; the names are those of transformers' own conversion. The router
stays what it was: its choice is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

# Gate, up and down where files do not say otherwise.
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


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


def separate_experts(model: nn.Module) -> None:
    """Put `Experts` (on meta) in place of every module with fused 3-D expert weights; done again it does nothing.

    Experts of another form than act(gate)·up, concatenated, without bias, stay as they are: see `block_linears`.
    """
    names = None
    for name, module in list(model.named_modules()):
        if _is_understood(module):
            names = names or projection_names(model)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _separated(module, names))


def projection_names(model: Any) -> tuple[str, str, str]:
    """What the files call gate, up and down of an expert, by transformers' own conversion for the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for conversion in get_model_conversion_mapping(model):
        parts = [re.search(r"experts\.\*\.(\w+)\.weight$", source) for source in conversion.source_patterns]
        for target in conversion.target_patterns:
            found.setdefault(target.rpartition(".")[2], [part[1] for part in parts if part])
    names = (*found.get("gate_up_proj", ()), *found.get("down_proj", ()))
    return (names[0], names[1], names[2]) if len(names) == 3 else _PROJECTIONS


def fused_source(name: str, names: tuple[str, str, str], shape: Sequence[int]) -> tuple[str, tuple[int, slice]] | None:
    """Where files with fused experts hold the tensor `….experts.3.up_proj.weight`: (tensor, (expert, rows)).

    names  of gate, up and down; shape is the tensor's own. None if `name` is no weight of an expert.
    """
    found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
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
    for name, experts in block.named_modules():
        parent, _, own_name = name.rpartition(".")
        if own_name != "experts":
            continue
        count = len(experts) if isinstance(experts, Experts) else max((len(p) for p in experts.parameters()), default=0)
        for child, sibling in block.get_submodule(parent).named_children():
            for own, module in sibling.named_modules(prefix=f"{parent}.{child}" if parent else child):
                if module is experts:
                    break
                routes = module is sibling or getattr(module, "out_features", None) == count
                if routes and any(True for _ in module.parameters(recurse=False)):
                    routing.add(own)
    return routing


def _is_understood(module: nn.Module) -> bool:
    """Whether these are experts of gate and up in one tensor, and down, that compute what an `Expert` does."""
    fused = dict(module.named_parameters(recurse=False))
    if set(fused) != {"gate_up_proj", "down_proj"} or fused["gate_up_proj"].dim() != 3:
        return False
    (experts, both, hidden), down = fused["gate_up_proj"].shape, tuple(fused["down_proj"].shape)
    expected = {"is_concatenated": True, "is_transposed": False, "has_bias": False, "has_gate": True}
    expected |= {"has_post_expert_norm": False}
    usual = all(getattr(module, key, value) == value for key, value in expected.items())
    # Experts that limit or shift gate and up before they are multiplied have a function of their own for it.
    gate = getattr(type(module), "_apply_gate", None)
    usual &= gate is None or gate.__module__.startswith("transformers.integrations.")
    return usual and down == (experts, hidden, both // 2) and hasattr(module, "act_fn")


def _separated(module: nn.Module, names: tuple[str, str, str]) -> Experts:
    fused = dict(module.named_parameters(recurse=False))
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
