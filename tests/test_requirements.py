"""requirements.within_reach: what is left out of a recipe that nobody chose, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import EXPERT_MODELS, save_tiny_model

from marlin_gptq import QuantizationConfig, requirements
from marlin_gptq.cli import quantize
from marlin_gptq.requirements import tuned_sizes, within_reach
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
