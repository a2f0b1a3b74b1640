"""requirements.py: what does not go together is one sentence, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from character_model import save_character_model
from click.testing import CliRunner
from helpers import EXPERT_MODELS, random_samples, save_tiny_model

from marlin_gptq import CheckpointError, InputError, QuantizationConfig, checkpoint, quantize_model
from marlin_gptq.cli.quantize import main
from marlin_gptq.distributed import Team
from marlin_gptq.requirements import require_combination, require_quantizable
from marlin_gptq.work_directory import WorkDirectory

CPU = torch.device("cpu")
TUNED = QuantizationConfig.from_preset("best", tune_steps=7)
ALONE = {"kept": False, "processes": 1, "limited": False, "experts": False}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"kept": True},
            r"^tune_steps: got 7 together with a work directory, .*; use --tune-steps 0 .* --work-dir out$",
        ),
        ({"processes": 2}, r"^tune_steps: got 7 in 2 processes, but .* runs in one; use --tune-steps 0 "),
        ({"limited": True}, r"^tune_steps: got 7 together with --max-gpu-memory, .*; use --tune-steps 0 "),
        ({"experts": True}, r"^tune_steps: got 7 for a model with experts, .*; use --tune-steps 0 "),
    ],
)
def test_what_the_tuning_does_not_go_with(changes: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        require_combination(TUNED, **(ALONE | changes))
    require_combination(TUNED, **ALONE)  # type: ignore[arg-type]
    for untuned in (QuantizationConfig(), QuantizationConfig(method="rtn", tune_steps=7)):
        require_combination(untuned, **(ALONE | changes))


def test_corrected_targets_do_not_go_with_experts(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "mixtral", **EXPERT_MODELS["mixtral"])
    config = QuantizationConfig(correct_target=0.25)
    for attempt in (
        lambda: require_quantizable(source, tmp_path / "out", config),
        lambda: quantize_model(source, tmp_path / "out", config, random_samples(4), device=CPU),
    ):
        with pytest.raises(InputError, match=r"^correct_target: got 0\.25 for a model with experts, .*; use 0$"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_library_refuses_them_too(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    samples = random_samples(8)
    with pytest.raises(InputError, match="in 2 processes"):
        quantize_model(source, tmp_path / "out", TUNED, samples, device=CPU, team=Team(0, 2))
    with WorkDirectory.new(tmp_path / "work", {}) as work, pytest.raises(InputError, match="a work directory"):
        quantize_model(source, tmp_path / "out", TUNED, samples, device=CPU, work=work)
    with pytest.raises(InputError, match="--max-gpu-memory"):
        quantize_model(source, tmp_path / "out", TUNED, samples, device=CPU, max_gpu_memory=10**9)
    experts = save_tiny_model(tmp_path / "experts", "qwen3_moe", **EXPERT_MODELS["qwen3_moe"])
    with pytest.raises(InputError, match="experts"):
        quantize_model(experts, tmp_path / "out", TUNED, samples, device=CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "source"]


def test_the_tuning_needs_the_disk_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "source")
    size = quantize_model(source, tmp_path / "first", QuantizationConfig(method="rtn"), [], device=CPU).bytes_after
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2 * size - 1}))
    require_quantizable(source, tmp_path / "out", QuantizationConfig())
    with pytest.raises(CheckpointError, match="the disk is full"):
        require_quantizable(source, tmp_path / "out", TUNED)


def test_the_command_refuses_them_before_it_reads_text(tmp_path: Path) -> None:
    model = save_character_model(tmp_path / "model")
    arguments = [str(model), "-o", str(tmp_path / "out"), "--dataset", "nonsense", "--preset", "fast"]
    for more, sentence in (
        (["--work-dir", str(tmp_path / "work")], "together with a work directory"),
        (["--max-gpu-memory", "1GB"], "together with --max-gpu-memory"),
    ):
        result = CliRunner().invoke(main, [*arguments, *more])
        assert result.exit_code == 2 and result.stderr.startswith("error: tune_steps: got 250 "), result.output
        assert sentence in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
