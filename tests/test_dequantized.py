"""modeling/dequantized.py: model.dequantize() gives the plain model that transformers would have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import EXPERT_MODELS, save_tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from marlin_gptq import QuantizationConfig, load, quantize_model

IDS = torch.arange(1, 40)[None]
MODELS = {
    "llama": {"attention_bias": True},
    "mixtral": EXPERT_MODELS["mixtral"],
    "qwen3_moe": EXPERT_MODELS["qwen3_moe"],
}


@pytest.mark.parametrize("architecture", MODELS)
def test_the_plain_model_comes_back(architecture: str, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", architecture, **MODELS[architecture])
    settings = QuantizationConfig(group_size=64, method="rtn", skip=(r"layers\.0\.self_attn\.o_proj",))
    quantize_model(source, tmp_path / "out", settings, [], device=torch.device("cpu"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits.float()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    plain = AutoModelForCausalLM.from_pretrained(source)
    described = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert described == {name: (p.shape, p.dtype, p.requires_grad) for name, p in plain.named_parameters()}
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        logits = model(IDS).logits
    assert float((logits - expected).norm() / expected.norm()) < 3e-3

    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load_file(tmp_path / "plain" / "model.safetensors")
    assert again.keys() == load_file(source / "model.safetensors").keys()
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(IDS).logits, logits)


def test_float32_keeps_every_weight(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    settings = QuantizationConfig(group_size=64, method="rtn")
    quantize_model(source, tmp_path / "out", settings, [], device=torch.device("cpu"))
    quantized = load(tmp_path / "out", device="cpu")
    name = "model.layers.1.mlp.down_proj"
    weight = quantized.get_submodule(name).dequantize()
    model = quantized.dequantize(torch.float32)
    assert model is quantized and model.config.dtype == model.dtype == torch.float32
    linear = model.get_submodule(name)
    assert type(linear) is nn.Linear and torch.equal(linear.weight, weight)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())  # as load gave it
    with pytest.raises(ValueError, match="quantize your model"):
        model.dequantize()
