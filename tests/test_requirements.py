"""requirements.within_reach: what is left out of a recipe that nobody chose, and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import EXPERT_MODELS, SEVEN_B, config_only, save_tiny_model

from marlin_gptq import QuantizationConfig, requirements
from marlin_gptq.cli import quantize
from marlin_gptq.requirements import tuned_sizes, within_reach
from marlin_gptq.tuning.memory import needed_bytes
from marlin_gptq.tuning.text import WINDOW

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BEST = QuantizationConfig.from_preset("best")
FAST = QuantizationConfig.from_preset("fast")
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
    """And the default, by name too; other recipes that were named are refused instead (test_cli_quantize.py)."""
    asked: list[QuantizationConfig] = []

    def refuse(_model: Path, _output: Path, config: QuantizationConfig, *_: object, **__: object) -> None:
        asked.append(config)
        raise requirements.InputError("far enough")

    monkeypatch.setattr(requirements, "require_quantizable", refuse)
    monkeypatch.setattr(requirements, "MOST_CPU_MINUTES", 0)
    command = [str(model), "-o", str(tmp_path / "out"), "--device", "cpu"]
    for extra in ([], ["--preset", "fast"], ["--preset", "best"], ["--tune-block-steps", "7"]):
        result = CliRunner().invoke(quantize.main, command + extra)
        assert result.exit_code == 2 and "far enough" in result.stderr
        told = "note: preset fast runs without its block tuning: on this CPU it would take" in result.stderr
        assert told is (extra in ([], ["--preset", "fast"]))
    without = replace(FAST, tune_block_steps=0)
    assert asked == [without, without, BEST, replace(FAST, tune_block_steps=7)]


def test_blocks_are_tuned_where_they_can_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that holds one block and one window of text, and on a CPU if the model is small."""
    without = replace(FAST, tune_block_steps=0)
    for way in ({"kept": True}, {"processes": 2}, {"limited": True, "free": 10**9}):
        assert within_reach(model, FAST, CPU, **way) == (FAST, "")  # type: ignore[arg-type]
        assert within_reach(model, FAST, GPU, **({"free": 10**9} | way)) == (FAST, "")  # type: ignore[arg-type]
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
