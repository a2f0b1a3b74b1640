"""modeling/uncalled.py: a linear whose weight its model multiplies by itself is never quantized."""

from __future__ import annotations

import torch
from helpers import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from marlin_gptq.modeling.architecture import block_linears, linear_names
from marlin_gptq.modeling.uncalled import uncalled_linears


class Block(nn.Module):
    """Four ways to use a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.multiplied, self.either, self.read = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype)) + self.multiplied.weight @ x
        x = self.either(x) if self.training else (self.either.weight @ x.T).T
        return nn.functional.linear(x, self.read.weight)


def test_what_the_source_multiplies_by_is_found() -> None:
    assert uncalled_linears(Block()) == {"multiplied", "either", "read"}
    assert uncalled_linears(nn.ModuleDict({"inner": Block()})) == {"inner.multiplied", "inner.either", "inner.read"}
    assert list(block_linears(Block(), "block")) == linear_names(Block(), "block") == ["block.called"]


def test_mambas_time_steps_stay_and_all_else_of_it_is_quantized() -> None:
    with torch.device("meta"):
        mamba = AutoModelForCausalLM.from_config(tiny_config("mamba", state_size=16)).backbone.layers[0]
        llama = AutoModelForCausalLM.from_config(tiny_config("llama")).model.layers[0]
        bloom = AutoModelForCausalLM.from_config(tiny_config("bloom")).transformer.h[0]
    assert uncalled_linears(mamba) == {"mixer.dt_proj"}
    assert uncalled_linears(llama) == uncalled_linears(bloom) == set()
    assert list(block_linears(mamba, "0")) == ["0.mixer.in_proj", "0.mixer.x_proj", "0.mixer.out_proj"]
