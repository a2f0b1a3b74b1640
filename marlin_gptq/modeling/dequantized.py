"""A quantized model as the plain one again: nn.Linear and transformers' own experts with the decoded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.modeling.architecture import set_module
from marlin_gptq.modeling.experts import Expert, Experts
from marlin_gptq.modeling.fused import split_projections
from marlin_gptq.modeling.linear import MarlinLinear


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put nn.Linear layers in place of all MarlinLinear of a transformers model, which is changed and returned.

    dtype: of the result, by default that of the model. A code times a scale has up to 15 significant bits, so float32
    keeps every weight and the 16-bit types round. Parameters require gradients where the input embedding does.
    """
    config: Any = model.config
    separated = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    dtype = dtype or config.dtype
    trains = model.get_input_embeddings().weight.requires_grad  # type: ignore[operator]
    split_projections(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, MarlinLinear):
            set_module(model, name, _linear(module, dtype, trains))
    if separated:
        _join_experts(model, separated, trains)
    if dtype != config.dtype:
        model.to(dtype)
        config.dtype = dtype
    return model


def _linear(layer: MarlinLinear, dtype: torch.dtype, trains: bool) -> nn.Linear:
    weight = layer.dequantize().to(dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=trains)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=trains)
    return linear.train(layer.training)


def _join_experts(model: nn.Module, separated: dict[str, Experts], trains: bool) -> None:
    """Undo `separate_experts`: gate_up_proj [experts, 2·inner, hidden], down_proj [experts, hidden, inner]."""
    with torch.device("meta"):
        plain = type(model)(model.config)
    for name, experts in separated.items():
        fused = plain.get_submodule(name)
        each = [_projections(experts[index]) for index in range(len(experts))]
        gate_up = torch.stack([torch.cat((gate, up)) for gate, up, _ in each])
        fused.gate_up_proj = nn.Parameter(gate_up, requires_grad=trains)
        fused.down_proj = nn.Parameter(torch.stack([down for _, _, down in each]), requires_grad=trains)
        set_module(model, name, fused.train(experts.training))
    if hasattr(model, "_weight_conversions"):  # without those that fuse experts: transformers then takes its own
        del model._weight_conversions


def _projections(expert: Expert) -> list[Tensor]:
    """The weights of gate, up and down."""
    return [expert.get_parameter(f"{name}.weight").detach() for name in expert.names]
