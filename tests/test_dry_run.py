"""marlin-quantize --dry-run: what it says, what it reads, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import EXPERT_MODELS, SEVEN_B, config_only, save_tiny_model

from marlin_gptq.cli.quantize import main
from marlin_gptq.known_gpus import KNOWN


def dry(*arguments: object) -> str:
    recipe = () if "--preset" in arguments else ("--preset", "marlin")
    result = CliRunner().invoke(main, [str(argument) for argument in (*arguments, *recipe, "--dry-run")])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_dry_run_reads_the_config_only(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", **SEVEN_B)
    text = dry(model)
    assert "model.layers.*.mlp.down_proj" in text and "int4, group 128" in text and "32 x 23.2 MB" in text
    assert "result       3.9 GB in 291 tensors" in text and "time         about" in text
    found = json.loads(dry(model, "--json", "--max-gpu-memory", "12GB", "--n-samples", 128, "--seq-len", 2048))
    assert found["peak_gpu_bytes"] < 12e9 and found["calibration_tokens"] == 128_000 and len(found["tensors"]) == 291
    assert found["output_bytes"] == sum(entry["bytes"] for entry in found["tensors"])
    assert found["peak_host_bytes"] > found["host_bytes_now"] > 0
    assert list(tmp_path.iterdir()) == [model] and len(list(model.iterdir())) == 1


def test_dry_run_for_a_gpu_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = config_only(tmp_path / "model", **SEVEN_B)
    text = dry(model, "--device", "cuda", "--max-gpu-memory", "12GB")
    assert "(of 141.0 GB)" in text and re.search(r"^time         about 10 to 30 s on one H200, ", text, re.MULTILINE)
    found = {gpu: json.loads(dry(model, "--gpu", gpu, "--json")) for gpu in ("h200", "a100-80", "4090")}
    assert all(one["device"] == "cuda" and one["gpu_bytes"] == KNOWN[gpu].memory for gpu, one in found.items())
    assert found["h200"]["seconds"] < found["a100-80"]["seconds"] < found["4090"]["seconds"]
    assert found["4090"]["plan"]["place"] == "device"
    assert json.loads(dry(model, "--gpu", "4090", "--json", "--n-samples", 4096))["plan"]["place"] == "host"
    assert "more than the 24.0 GB of it" in dry(model, "--gpu", "4090", "--spill", "none", "--n-samples", 4096)
    default = CliRunner().invoke(main, [str(model), "--dry-run", "--device", "cuda"])
    assert "note: there is no GPU here: estimated for one H200; --gpu names another" in default.stderr
    assert "tuned blocks " in default.stdout
    whole = CliRunner().invoke(main, [str(model), "--dry-run", "--gpu", "h200", "--preset", "best"])
    assert "tuning       4000 steps" in whole.stdout, "111 GB, which it has"
    less = CliRunner().invoke(main, [str(model), "--dry-run", "--gpu", "4090", "--max-gpu-memory", "4GB"])
    assert "note: preset fast runs without its block tuning: tuning block by block needs about" in less.stderr
    for arguments, sentence in ((["--device", "cpu"], "beside --device cpu"), (["-o", "out"], "goes with --dry-run")):
        only = [] if "-o" in arguments else ["--dry-run"]
        result = CliRunner().invoke(main, [str(model), *only, "--gpu", "4090", *arguments])
        assert result.exit_code == 2 and sentence in result.stderr


def test_times_are_the_same_at_each_call(tmp_path: Path) -> None:
    """A machine's speed is measured and then rounded by far: three calls beside whatever else runs here."""
    model = config_only(tmp_path / "model", **SEVEN_B)
    assert len({json.loads(dry(model, "--json", "--device", "cpu"))["seconds"] for _ in range(3)}) == 1


def test_dry_run_says_what_the_tuning_adds(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", **SEVEN_B)
    text = dry(model, "--preset", "best", "--device", "cpu")
    assert "(memory, time and plan are those of the pass over the blocks, without the tuning)" in text
    assert "tuning       4000 steps of 16 windows, on a GPU with 11" in text
    found, plain = (json.loads(dry(model, "--preset", "best", "--json", *more)) for more in ((), ("--tune-steps", 0)))
    assert plain["tuning"] is None and found["peak_gpu_bytes"] == plain["peak_gpu_bytes"]
    assert 105e9 < found["tuning"]["least_gpu_bytes"] < 120e9 < found["tuning"]["most_gpu_bytes"]
    assert "tuning" not in dry(model, "--preset", "marlin")


def test_dry_run_of_a_hub_model_fetches_its_config_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = config_only(tmp_path / "model", **SEVEN_B), []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, allow_patterns))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert "291 tensors" in dry("owner/name")
    assert asked == [("owner/name", ["config.json"])]


def test_dry_run_of_experts_shares_lines(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "mixtral", **EXPERT_MODELS["mixtral"])
    text = dry(model, "--method", "rtn")
    assert "block_sparse_moe.experts.*.w1" in text and "    8 x " in text


def test_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    model = config_only(tmp_path / "model", **(SEVEN_B | {"intermediate_size": 11000}))
    for arguments, sentence in (
        ((), "group size 128 does not divide its 11000 input features"),
        (("--group-size", -1, "--max-gpu-memory", "1GB"), "--max-gpu-memory: got 1.00 GB, but"),
        (("--max-gpu-memory", "much"), "--max-gpu-memory: got 'much', expected a size such as"),
        (("--spill", "moon"), "Invalid value for '--spill'"),
        (("--group-size", -1, "--preset", "best", "--max-gpu-memory", "80GB"), "together with --max-gpu-memory"),
        (("--group-size", -1, "--preset", "best", "--work-dir", tmp_path / "work"), "together with a work directory"),
    ):
        result = CliRunner().invoke(
            main, [str(argument) for argument in (model, "--dry-run", "--preset", "marlin", *arguments)]
        )
        assert result.exit_code == 2 and sentence in result.stderr, result.output


@pytest.mark.gpu
def test_dry_run_on_the_gpu_that_is_here(tmp_path: Path) -> None:
    """Its memory is asked, its rate known by its name, or measured and rounded: the same at each call."""
    model = config_only(tmp_path / "model", **SEVEN_B)
    first, second = (json.loads(dry(model, "--device", "cuda", "--json")) for _ in range(2))
    assert first["seconds"] == second["seconds"] > 0
    total = torch.cuda.get_device_properties(0).total_memory
    assert first["machine"] == torch.cuda.get_device_name() and 0 < first["gpu_bytes"] <= total
