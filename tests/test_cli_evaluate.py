"""marlin-eval perplexity: table, JSON, baseline, and its bad inputs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from character_model import save_character_model
from click.testing import CliRunner, Result

from marlin_gptq.cli import options, quantize
from marlin_gptq.cli.evaluate import main
from marlin_gptq.kernel import library


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("character-model"))


@pytest.fixture(scope="module")
def quantized_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "out"
    result = CliRunner().invoke(quantize.main, [str(model_dir), "-o", str(output), "--method", "rtn"])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("All happy families are alike; every unhappy family is so in its way. " * 8)
    return str(tmp_path / "text.txt")


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr.strip().split("\n")[-1].removeprefix("error: ")


@pytest.mark.parametrize("command", ["perplexity", "throughput", "mmlu", "report"])
def test_a_baseline_in_the_place_of_the_model(model_dir: Path, quantized_dir: Path, command: str) -> None:
    sentence = refused(command, model_dir, "--baseline", quantized_dir)
    assert sentence == (
        f"--baseline: got {quantized_dir}, which is quantized, for {model_dir}, which is not; the two have changed "
        f"places: give {quantized_dir} --baseline {model_dir}"
    )


def test_a_baseline_that_is_another_model(quantized_dir: Path, text: str, tmp_path: Path) -> None:
    other = save_character_model(tmp_path / "other", intermediate_size=384)
    arguments = ("--dataset", text, "--device", "cpu", "--seq-len", 64, "--no-divergence")
    result = run("perplexity", quantized_dir, "--baseline", other, *arguments)
    assert result.exit_code == 0, result.output
    warning = f"warning: --baseline {other} is not the model that {quantized_dir} was made from: intermediate_size "
    assert warning in result.stderr
    assert "warning: --baseline" not in run("perplexity", quantized_dir, "--baseline", quantized_dir, *arguments).stderr


def test_a_baseline_of_several_parts() -> None:
    config = {"model_type": "whole", "text_config": {"model_type": "text", "hidden_size": 8}, "vocab_size": 9}
    assert [options._setting(config, key) for key in ("model_type", "hidden_size", "vocab_size")] == ["text", 8, 9]


def test_a_model_beside_its_baseline(model_dir: Path, quantized_dir: Path, text: str) -> None:
    arguments = ("perplexity", quantized_dir, "--baseline", model_dir, "--dataset", text, "--device", "cpu")
    result = run(*arguments, "--seq-len", 64)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout and "tokens/s" in result.stdout
    assert "reference path in plain torch" in result.stdout
    assert "full precision (no quantized layers)" in result.stdout
    difference = next(line for line in result.stdout.split("\n") if "difference" in line)
    assert " %" in difference
    assert "non-overlapping windows of 64" in result.stdout
    assert result.stderr.count("100%  elapsed") == 1

    content = json.loads(run(*arguments, "--seq-len", 64, "--json").stdout)
    assert content["model"] == str(quantized_dir) and content["baseline"]["model"] == str(model_dir)
    assert content["tokens"] == content["baseline"]["tokens"] == 8 * 63
    change = content["perplexity"] - content["baseline"]["perplexity"]
    assert content["difference"]["perplexity"] == pytest.approx(change) and change != 0
    assert content["difference"]["comparable"] is True
    assert content["seq_len"] == 64 and content["tokens_per_second"] > 0 and content["nll"] > 0
    found = content["divergence"]
    assert found["kl_nats"] > 0 and 0 < found["top1_agreement_percent"] < 100 and found["windows"] == 8
    assert f"KL(baseline ‖ model) {found['kl_nats']:.5f} ± {found['kl_nats_standard_error']:.5f}" in result.stdout
    alone = run("perplexity", model_dir, *arguments[4:], "--seq-len", 64, "--json")
    assert json.loads(alone.stdout)["divergence"] is None


def test_a_baseline_that_cannot_be_compared(model_dir: Path, tmp_path: Path, text: str) -> None:
    larger = save_character_model(tmp_path / "larger", vocab_size=128)
    arguments = ("perplexity", model_dir, "--baseline", larger, "--dataset", text, "--seq-len", 64, "--device", "cpu")
    assert "note: the vocabularies have 96 and 128 tokens" in run(*arguments).stdout
    content = json.loads(run(*arguments, "--json").stdout)
    assert content["divergence"] is None and "vocabularies" in content["divergence_missing"]
    assert content["baseline"]["perplexity"] > 0


def test_the_hint_on_the_kernel(
    quantized_dir: Path, model_dir: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = library.KernelStatus(available=True)
    monkeypatch.setattr(library, "status", lambda: compiled)
    arguments = ("--dataset", text, "--seq-len", 64, "--device", "cpu", "--limit", 1)
    assert "It is compiled here and runs on an NVIDIA GPU" in run("perplexity", quantized_dir, *arguments).stdout
    missing = library.KernelStatus(available=False, reason="not compiled", hint="Install a compiler.")
    monkeypatch.setattr(library, "status", lambda: missing)
    result = run("perplexity", quantized_dir, *arguments)
    assert "note: the reference path ran, not the CUDA kernel. Install a compiler." in result.stdout
    assert json.loads(run("perplexity", quantized_dir, *arguments, "--json").stdout)["hint"] == "Install a compiler."
    assert "CUDA kernel" not in run("perplexity", model_dir, *arguments).stdout


def test_the_window_follows_the_shorter_context(model_dir: Path, tmp_path: Path, text: str) -> None:
    longer = save_character_model(tmp_path / "longer", max_position_embeddings=300)
    arguments = ("perplexity", longer, "--dataset", text, "--device", "cpu", "--json")
    assert json.loads(run(*arguments).stdout)["seq_len"] == 300
    result = run(*arguments, "--baseline", model_dir)
    assert json.loads(result.stdout)["seq_len"] == 256
    assert "note: windows of 256 tokens, the model's context" in result.stderr


def test_two_runs_give_the_same_figure(model_dir: Path) -> None:
    arguments = ("perplexity", model_dir, "--dataset", "demo", "--n-samples", 2, "--limit", 2, "--seq-len", 64)
    one, other = (json.loads(run(*arguments, "--json").stdout) for _ in range(2))
    assert one["perplexity"] == other["perplexity"]
    assert "2 documents chosen by seed 0" in one["protocol"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seq-len", "512"), "seq_len: got 512, the model's context (max_position_embeddings) holds 256 tokens"),
        (("--dataset", "wikitext"), "dataset: got 'wikitext', did you mean wikitext2?"),
        (("--dataset", "none.jsonl"), "dataset: no such file: none.jsonl"),
        (("--baseline", "./nowhere"), "./nowhere: no such directory"),
        (("--batch-size", "0"), "Invalid value for '--batch-size'"),
        (("--dtype", "int8"), "Invalid value for '--dtype'"),
    ],
)
def test_bad_inputs(model_dir: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("perplexity", model_dir, *arguments)


def test_models_that_cannot_be_evaluated(tmp_path: Path) -> None:
    assert "no such directory" in refused("perplexity", tmp_path / "nowhere")
    assert "holds no config.json" in refused("perplexity", tmp_path)


def test_a_quantized_model_with_the_wrong_group_size(quantized_dir: Path, tmp_path: Path, text: str) -> None:
    for file in quantized_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentence = refused("perplexity", tmp_path, "--dataset", text)
    assert ".scales: got [1, 128], expected [2, 128]" in sentence and "group_size 64" in sentence


def test_usage_mistakes() -> None:
    assert "Missing command" in refused()
    assert "No such command 'perplexty'" in refused("perplexty")
    assert "Missing argument 'MODEL' (see marlin-eval perplexity --help)" in refused("perplexity")


def test_help() -> None:
    assert "perplexity" in run("--help").stdout
    text = run("perplexity", "--help").stdout
    wanted = set(
        re.findall(
            r"--[a-z-]+",
            """
        --dataset --seq-len --baseline --limit --device --dtype --batch-size --offline --revision --n-samples
        --seed --json --debug
    """,
        )
    )
    assert wanted <= set(re.findall(r"--[a-z-]+", text))


def test_exit_code_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "marlin_gptq.cli.evaluate", "perplexity", str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
