"""requirements.py: what is left out of a recipe that nobody chose, what of a model is kept, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import EXPERT_MODELS, save_tiny_model
from safetensors.torch import load_file, save_file

from marlin_gptq import InputError, QuantizationConfig, convert_checkpoint, quantize_model, requirements
from marlin_gptq.cli import quantize
from marlin_gptq.requirements import require_quantizable, tuned_sizes, within_reach
from marlin_gptq.tuning.memory import needed_bytes
from marlin_gptq.tuning.text import WINDOW

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BEST = QuantizationConfig.from_preset("best")
PASS = QuantizationConfig.from_preset("best", tune_steps=0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))


def test_all_of_it_where_it_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 1 << 40)
    assert within_reach(model, BEST, GPU) == (BEST, "")


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ({"kept": True}, "it does not go with a work directory"),
        ({"processes": 2}, "it runs in one process"),
        ({"limited": True}, "it does not go with --max-gpu-memory"),
    ],
)
def test_no_tuning_in_runs_that_cannot_have_it(model: Path, way: dict, reason: str) -> None:
    assert within_reach(model, BEST, GPU, **way) == (
        PASS,
        f"preset best runs without its end-to-end tuning: {reason}",
    )


def test_no_tuning_without_a_gpu_or_with_experts(model: Path, tmp_path: Path) -> None:
    found, reason = within_reach(model, BEST, CPU)
    assert found == PASS and reason.endswith("without a GPU it takes days")
    experts = save_tiny_model(tmp_path / "experts", "mixtral", **EXPERT_MODELS["mixtral"])
    found, reason = within_reach(experts, BEST, GPU)
    assert found == PASS and reason.endswith("it does not know experts")


def test_what_fits_the_memory_stays(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = {
        codes: needed_bytes(tuned_sizes(model, BEST), batch=BEST.tune_batch, length=WINDOW, tune_codes=codes)[0]
        for codes in (True, False)
    }
    assert least[False] < least[True]
    with_free(monkeypatch, int((least[False] + least[True]) / 2 / 0.9))
    found, reason = within_reach(model, BEST, GPU)
    assert found.tune_steps == BEST.tune_steps and not found.tune_codes
    assert reason.startswith("preset best tunes scales and norm weights only: with codes tuning end to end needs about")
    with_free(monkeypatch, least[False] // 2)
    found, reason = within_reach(model, BEST, GPU)
    assert found == PASS and "GB are free" in reason


def test_recipes_without_tuning_stay_as_they_are(model: Path) -> None:
    for config in (QuantizationConfig(), PASS, QuantizationConfig.from_preset("best", method="rtn")):
        assert within_reach(model, config, CPU, kept=True) == (config, "")


def test_the_command_decides_only_what_nobody_chose(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that was named is refused instead (test_cli_quantize.py)."""
    asked: list[QuantizationConfig] = []

    def refuse(_model: Path, _output: Path, config: QuantizationConfig, *_: object, **__: object) -> None:
        asked.append(config)
        raise requirements.InputError("far enough")

    monkeypatch.setattr(requirements, "require_quantizable", refuse)
    command = [str(model), "-o", str(tmp_path / "out"), "--device", "cpu"]
    for extra in ([], ["--preset", "best", "--tune-steps", "0"], ["--tune-steps", "4000"]):
        result = CliRunner().invoke(quantize.main, command + extra)
        assert result.exit_code == 2 and "far enough" in result.stderr
        assert ("note: preset best runs without its end-to-end tuning" in result.stderr) is (extra == [])
    assert asked == [PASS, PASS, BEST]
    for extra in (["--preset", "best"], ["--tune-rate", "1e-3"]):
        result = CliRunner().invoke(quantize.main, command + extra)
        assert result.exit_code == 2 and len(asked) == 3
        sentence = result.stderr.strip().split("\n")[-1]
        assert sentence.startswith("error: --preset best: its end-to-end tuning takes days without a GPU")
        assert "use --tune-steps 0" in sentence


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
