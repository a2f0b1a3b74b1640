"""requirements.py: what is left out of a recipe that nobody chose, what of a model is kept, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import EXPERT_MODELS, SEVEN_B, config_only, save_tiny_model
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaModel

from marlin_gptq import InputError, QuantizationConfig, convert_checkpoint, quantize_model, requirements
from marlin_gptq.cli import quantize
from marlin_gptq.requirements import require_quantizable, within_reach

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BEST = QuantizationConfig.from_preset("best")
FAST = QuantizationConfig.from_preset("fast")
PASS = QuantizationConfig.from_preset("best", tune_steps=0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))


def test_recipes_without_tuning_stay_as_they_are(model: Path) -> None:
    for config in (QuantizationConfig(), PASS, QuantizationConfig.from_preset("best", method="rtn")):
        assert within_reach(model, config, CPU) == (config, "")


def test_the_command_decides_only_what_nobody_chose(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the default, by name too; other recipes that were named are refused instead (test_cli_quantize.py)."""
    asked: list[QuantizationConfig] = []

    def refuse(_model: Path, _output: Path, config: QuantizationConfig, *_: object, **__: object) -> None:
        asked.append(config)
        raise requirements.InputError("far enough")

    monkeypatch.setattr(requirements, "require_quantizable", refuse)
    monkeypatch.setattr(requirements, "MOST_CPU_MINUTES", 0)
    command = [str(model), "-o", str(tmp_path / "out"), "--device", "cpu"]
    for extra in ([], ["--preset", "fast"], ["--preset", "best", "--tune-steps", "9"], ["--tune-block-steps", "7"]):
        result = CliRunner().invoke(quantize.main, command + extra)
        assert result.exit_code == 2 and "far enough" in result.stderr
        told = "note: preset fast runs without its block tuning: on this CPU it would take" in result.stderr
        assert told is (extra in ([], ["--preset", "fast"]))
    without = replace(FAST, tune_block_steps=0)
    assert asked == [without, without, replace(BEST, tune_steps=9), replace(FAST, tune_block_steps=7)]
    for extra in (["--preset", "best"], ["--preset", "best", "--tune-rate", "1e-3"]):
        result = CliRunner().invoke(quantize.main, command + extra)
        assert result.exit_code == 2 and len(asked) == 4
        sentence = result.stderr.strip().split("\n")[-1]
        assert sentence.startswith("error: --preset best: its end-to-end tuning takes days without a GPU")
        assert "use --tune-steps 0" in sentence


def test_blocks_are_tuned_where_they_can_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that holds one block and one window of text, and on a CPU if the model is small."""
    without = replace(FAST, tune_block_steps=0)
    assert within_reach(model, FAST, CPU) == within_reach(model, FAST, GPU, free=10**9) == (FAST, "")
    found, reason = within_reach(model, FAST, GPU, free=10**5)
    assert found == without
    assert reason.startswith("preset fast runs without its block tuning: tuning block by block needs about")
    with_free(monkeypatch, 10**5)
    assert within_reach(model, FAST, GPU)[0] == without and within_reach(model, without, GPU) == (without, "")
    seven = config_only(tmp_path / "7b", **SEVEN_B)
    least = 4 * 10**9  # of which 16 bytes for each of 200 million weights
    assert within_reach(seven, FAST, GPU, free=least)[0] == without
    assert within_reach(seven, FAST, GPU, free=2 * least) == (FAST, "")
    found, reason = within_reach(seven, FAST, CPU)
    assert found == without and "on this CPU it would take about" in reason
    experts = save_tiny_model(tmp_path / "experts", "mixtral", **EXPERT_MODELS["mixtral"])
    found, reason = within_reach(experts, FAST, GPU)
    assert found == without and reason == "preset fast runs without its block tuning: it does not know experts"
    scan = config_only(tmp_path / "mamba", model_type="mamba", hidden_size=128, num_hidden_layers=2, vocab_size=96)
    for device in (CPU, GPU):
        found, reason = within_reach(scan, FAST, device, free=10**9)
        assert found == without and "gradients of a scan token by token take hours" in reason


def test_what_no_setting_mends_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3n has groups that do not fit, too, but another group size would lead nowhere."""

    def forward(model: Any, inputs_embeds: torch.Tensor, **_: Any) -> None:
        model.layers[0](inputs_embeds, per_layer_input=2 * inputs_embeds)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    model = save_tiny_model(tmp_path / "model", intermediate_size=192)
    assert within_reach(model, FAST, CPU) == (FAST, "")
    result = CliRunner().invoke(quantize.main, [str(model), "-o", str(tmp_path / "out"), "--device", "cpu"])
    assert result.exit_code == 2 and "get more of each token than its hidden state" in result.stderr


def with_tensors(directory: Path, more: dict[str, torch.Tensor]) -> Path:
    save_tiny_model(directory)
    file = directory / "model.safetensors"
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    return directory


def test_tensors_without_a_place_are_kept_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "model.layers.2.mlp.up_proj.weight": torch.randn(256, 128),  # layers that predict further tokens
        "mtp.fc.weight": torch.randn(4, 4, dtype=torch.bfloat16),
        "score.weight": torch.randn(2, 128).half(),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
        "model.layers.1.self_attn.masked_bias": torch.tensor(-1e9),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(128).half(),  # of old tools
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
    }
    model = with_tensors(tmp_path / "model", more)
    monkeypatch.setattr(logging.getLogger("marlin_gptq"), "propagate", True)
    report = quantize_model(model, tmp_path / "out", QuantizationConfig(method="rtn"), [], device=CPU)
    kept = sorted(name for name in more if "q_proj" not in name and "rotary" not in name)
    assert report.unknown_tensors == kept
    assert f"5 tensors that the architecture has no place for are kept as they are ({kept[0]})" in caplog.text
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert all(held[name].dtype == more[name].dtype and torch.equal(held[name], more[name]) for name in kept)
    assert not {name for name in more if name not in kept} & held.keys()
    assert report.bytes_after == sum(tensor.nbytes for tensor in held.values())
    convert_checkpoint(tmp_path / "out", tmp_path / "gptq", "gptq")
    assert set(kept) <= load_file(tmp_path / "gptq" / "model.safetensors").keys()


def test_a_range_that_no_text_has_tried_is_told(tmp_path: Path) -> None:
    rounded = QuantizationConfig(method="rtn")
    wide = save_tiny_model(tmp_path / "wide", dtype=torch.bfloat16)
    (told,) = require_quantizable(wide, tmp_path / "out", rounded, torch.float16)
    assert told.startswith("a bfloat16 model becomes float16, and round-to-nearest runs no text")
    assert not require_quantizable(wide, tmp_path / "out", rounded)
    assert not require_quantizable(wide, tmp_path / "out", QuantizationConfig(), torch.float16)


@pytest.mark.parametrize("name", ["bias", "weight_scale", "lora_A.default.weight"])
def test_tensors_of_a_linear_that_would_be_left_out_are_refused(tmp_path: Path, name: str) -> None:
    owner = "model.layers.1.mlp.down_proj"
    model = with_tensors(tmp_path / "model", {f"{owner}.{name}": torch.ones(128)})
    with pytest.raises(
        InputError, match=rf"{owner}\.{name}: the architecture has no place for it, and {owner} would be"
    ):
        require_quantizable(model, tmp_path / "out", QuantizationConfig(method="rtn"))
    require_quantizable(model, tmp_path / "out", QuantizationConfig(method="rtn", skip=("down_proj",)))


def test_settings_in_a_file_of_their_own_say_quantized_too(model: Path, tmp_path: Path) -> None:
    (model / "quantize_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is quantized already \(by gptq\)"):
        require_quantizable(model, tmp_path / "out", QuantizationConfig(method="rtn"))
