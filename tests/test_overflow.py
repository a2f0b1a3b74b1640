"""modeling/overflow.py: activations that float16 cannot hold are noticed in the calibration, wherever that runs.

And weights that are too small for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file, save_file

from marlin_gptq import QuantizationConfig, QuantizationError, quantize_model

CPU = torch.device("cpu")
SETTINGS = QuantizationConfig.from_preset("marlin", group_size=64)
# Weights of block 0 that are made larger (within float16), and what is then said on a CPU.
CASES = {
    "product": ({"up_proj": 5e5}, r"layers\.0\.mlp\.up_proj: gives activations of up to \d"),
    "inner": ({"gate_proj": 2e4, "up_proj": 2e4}, r"layers\.0\.mlp\.down_proj: gets activations of up to \d"),
    "residual": ({"up_proj": 100, "down_proj": 5e5}, r"layers\.0\.mlp\.down_proj: gives activations of up to \d"),
}


def loud(directory: Path, factors: dict[str, float]) -> Path:
    """A bfloat16 model with these weights of block 0 multiplied."""
    source = save_tiny_model(directory, dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    for own, factor in factors.items():
        tensors[f"model.layers.0.mlp.{own}.weight"] *= factor
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sequential", [False, True])
def test_noticed_on_a_cpu(tmp_path: Path, name: str, sequential: bool) -> None:
    factors, message = CASES[name]
    source = loud(tmp_path / "source", factors)
    settings = QuantizationConfig.from_preset("marlin", group_size=64, true_sequential=sequential)
    with pytest.raises(QuantizationError, match=message + r".* beyond the 65504 of float16.*use --dtype bfloat16"):
        quantize_model(source, tmp_path / "out", settings, random_samples(4), device=CPU, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_nothing_to_say_of_bfloat16_of_small_ones_and_of_rounding(tmp_path: Path) -> None:
    source = loud(tmp_path / "source", CASES["residual"][0])
    quantize_model(source, tmp_path / "bfloat16", SETTINGS, random_samples(4), device=CPU)
    rounding = QuantizationConfig(method="rtn", group_size=64)
    quantize_model(source, tmp_path / "rtn", rounding, [], device=CPU, dtype=torch.float16)
    source = loud(tmp_path / "small", {"down_proj": 1e3})
    quantize_model(source, tmp_path / "out", SETTINGS, random_samples(4), device=CPU, dtype=torch.float16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_what_is_too_small_is_named(tmp_path: Path, device: str, method: str, caplog: pytest.LogCaptureFixture) -> None:
    source = loud(tmp_path / "source", {"up_proj": 1e-5, "gate_proj": 1e-9})
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] *= 1e-9
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    settings = QuantizationConfig.from_preset("marlin", group_size=64, method=method)
    for dtype in (torch.float16, torch.bfloat16):
        caplog.clear()
        quantize_model(
            source, tmp_path / str(dtype), settings, random_samples(4), device=torch.device(device), dtype=dtype
        )
        said = [record.getMessage() for record in caplog.records if "too small" in record.getMessage()]
        if dtype == torch.bfloat16:
            assert not said
            continue
        assert all(sentence.endswith("use --dtype bfloat16") for sentence in said)
        assert {sentence.partition(":")[0].removesuffix(".weight") for sentence in said} == {
            "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.input_layernorm",
        }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_noticed_on_a_gpu(tmp_path: Path, name: str) -> None:
    source = loud(tmp_path / "source", CASES[name][0])
    message = r"inputs in the calibration hold NaN or Inf; activations before it pass .* float16: use --dtype bfloat16"
    with pytest.raises(QuantizationError, match=message):
        quantize_model(
            source, tmp_path / "out", SETTINGS, random_samples(4), device=torch.device("cuda"), dtype=torch.float16
        )
