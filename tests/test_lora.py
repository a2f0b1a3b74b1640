"""modeling/lora.py: adapters of peft on a quantized model are trained, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EXPERT_MODELS, save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from marlin_gptq import InputError, MarlinLinear, QuantizationConfig, add_lora, quantize_model
from marlin_gptq.modeling.fused import FusedLinear, Projection

peft = pytest.importorskip("peft")
IDS = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(7))


NEAR = 4e-2  # relative distance of bfloat16 logits that are the same but for rounding


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("lora"), "llama", attention_bias=True)


def made(directory: Path, architecture: str, **changes: Any) -> Path:
    source = save_tiny_model(directory / "source", architecture, dtype=torch.bfloat16, **changes)
    settings = QuantizationConfig(group_size=64, method="rtn")
    quantize_model(source, directory / "out", settings, [], device=torch.device("cpu"))
    return directory / "out"


def loaded(directory: Path, device: str = "cpu") -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, device_map=device)


def trained(model: Any, steps: int = 12) -> list[float]:
    """The loss of the same text, before each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids, losses = IDS.to(model.device), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS.to(model.device)).logits.float().cpu()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_trained_saved_loaded_merged(quantized: Path, tmp_path: Path, device: str) -> None:
    codes = {name: tensor.clone() for name, tensor in loaded(quantized, device).state_dict().items()}
    base = loaded(quantized, device)
    before = logits(base)
    model = add_lora(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert distance(logits(model), before) < NEAR  # an adapter starts as nothing; products may be split anew
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 6 and all(isinstance(layer.get_base_layer(), MarlinLinear) for layer in layers)
    # gate and up have no adapter: fused as before
    assert sum(isinstance(m, FusedLinear) for m in model.modules()) == 2

    losses = trained(model)
    assert losses[-1] < 0.9 * losses[0]
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    state = base.state_dict()
    for name, tensor in codes.items():
        inner = name if name in state else f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"
        assert torch.equal(state[inner], tensor), name

    expected = logits(model)
    assert distance(expected, before) > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = add_lora(loaded(quantized, device), tmp_path / "adapter")
    assert distance(logits(again), expected) < NEAR
    assert not any(p.requires_grad for p in again.parameters())
    assert distance(logits(again.unload()), before) < NEAR

    # On the plain model of the same weights, by peft alone; and where it was trained.
    plain = peft.PeftModel.from_pretrained(loaded(quantized, device).dequantize(torch.float32), tmp_path / "adapter")
    assert distance(logits(plain.merge_and_unload()), expected) < NEAR
    with pytest.raises(InputError, match=r"merge: 4-bit weights cannot take up an adapter; call dequantize\(\)"):
        model.merge_and_unload()
    model.dequantize(torch.float32)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, MarlinLinear | peft.tuners.lora.LoraLayer) for m in merged.modules())
    assert distance(logits(merged), expected) < NEAR


def test_all_linear_and_continued_training(quantized: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    model = add_lora(loaded(quantized), config)
    assert config.target_modules == "all-linear"  # the caller's own is left alone
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()) == 14
    assert not any(isinstance(m, Projection) for m in model.modules())
    model.save_pretrained(tmp_path / "adapter")
    again = add_lora(loaded(quantized), tmp_path / "adapter", is_trainable=True)
    losses = trained(again, 6)
    assert losses[-1] < losses[0]


def test_models_with_experts(tmp_path: Path) -> None:
    directory = made(tmp_path, "mixtral", **EXPERT_MODELS["mixtral"])
    for targets in (["q_proj", "w2"], r".*\.w2"):
        with pytest.raises(InputError, match=r"experts\.0\.w2 is a projection of an expert, and adapters of quantized"):
            add_lora(loaded(directory), peft.LoraConfig(target_modules=targets))
    model = add_lora(loaded(directory), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()) == 8
    losses = trained(model, 6)
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.dequantize(torch.float32)
    assert distance(logits(model.merge_and_unload()), expected) < NEAR


def test_prompts_are_trained_by_peft_alone(quantized: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(loaded(quantized), config)
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert model.hf_quantizer.is_trainable  # transformers' Trainer asks


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"use_dora: needs the full weight, which a 4-bit layer does not hold"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa': needs the full weight"),
    ],
)
def test_what_needs_the_full_weight_is_refused(quantized: Path, config: dict[str, Any], message: str) -> None:
    model = loaded(quantized)
    with pytest.raises(InputError, match=message):
        add_lora(model, peft.LoraConfig(target_modules=["q_proj"], **config))
    with pytest.raises(InputError, match=r"adapter: got a IA3Config, expected a LoraConfig"):
        add_lora(model, peft.IA3Config())
    assert any(isinstance(m, FusedLinear) for m in model.modules())  # untouched
