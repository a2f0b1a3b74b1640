"""marlin-eval throughput and scripts/make_random_checkpoint.py: figures, ratios, JSON, and bad inputs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import save_tiny_model
from safetensors.torch import load_file
from torch._dynamo.exc import TorchDynamoException

from marlin_gptq import InputError, MarlinLinear, QuantizationConfig, quantize_model
from marlin_gptq.cli.evaluate import main
from marlin_gptq.cli.evaluate_throughput import add_ratios, modes_of
from marlin_gptq.eval import throughput
from marlin_gptq.eval.report import read_throughput
from marlin_gptq.eval.throughput import Request, measure, memory, require_room
from marlin_gptq.eval.whole_model import load_whole
from marlin_gptq.modeling.decoding import Decoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("speed") / "base")


@pytest.fixture(scope="module")
def ours(base: Path) -> Path:
    quantize_model(base, base.parent / "ours", QuantizationConfig(group_size=64, method="rtn"), [], device=CPU)
    return base.parent / "ours"


def run(*arguments: Any) -> Result:
    settings = ("--device", "cpu", "--batch", "1,2", "--prompt", 6, "--new-tokens", 4, "--repeats", 1)
    return CliRunner().invoke(main, ["throughput", *map(str, (*settings, *arguments))])


def refused(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return result.stderr.strip().split("\n")[-1].removeprefix("error: ")


def test_a_model_beside_its_baseline(ours: Path, base: Path, tmp_path: Path) -> None:
    result = run(ours, "--baseline", base)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("x baseline") == 3  # a row for each batch, and the memory
    assert "reference path in plain torch" in result.stdout and "medians of 1" in result.stdout
    assert "note: no CUDA graphs on a CPU" in result.stderr

    result = run(ours, "--baseline", base, "--json")
    content = json.loads(result.stdout)
    assert content["complete"] and content["device"] == "cpu" and content["prompt"] == 6
    rows = content["rows"]
    assert [(row["model"], row["mode"], row["batch"]) for row in rows] == [
        (str(name), "eager", batch) for name in (ours, base) for batch in (1, 2)
    ]
    for row in rows:
        assert row["error"] == "" and row["time_to_first_token"] > 0
        assert row["prefill_tokens_per_second"] == pytest.approx(row["batch"] * 6 / row["time_to_first_token"])
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch"] / row["decode_step_seconds"])
    assert [ratio["batch"] for ratio in content["ratios"]] == [1, 2]
    speeds = [row["decode_tokens_per_second"] for row in rows]
    assert content["ratios"][1]["decode_tokens_per_second"] == pytest.approx(speeds[1] / speeds[3])
    # per weight of the linears 4 bits and a 16-bit scale for 64, against 32 bits: computed in float32 on a CPU
    assert content["memory_ratio"]["linears"] == pytest.approx((4 + 16 / 64) / 32)
    file = tmp_path / "speed.json"
    file.write_text(result.stdout)
    assert read_throughput(file) == rows  # as the report takes it


def test_requests_are_timed_as_described(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_whole(base, CPU)
    events: list[str] = []
    for name in ("prefill", "step"):
        whole = getattr(Decoder, name)
        monkeypatch.setattr(Decoder, name, lambda *a, n=name, f=whole: events.append(n) or f(*a))
    ticks = iter(range(1000))
    monkeypatch.setattr(throughput, "_clock", lambda _: events.append("clock") or float(next(ticks)))
    (speed,) = measure(model, [Request(3, 5, 4)], ["eager"], repeats=2)
    assert events == ["clock", "prefill", "clock", "step", "step", "step", "clock"] * 3
    assert speed.time_to_first_token == 1 and speed.decode_step_seconds == pytest.approx(1 / 3)
    assert speed.prefill_tokens_per_second == 15 and speed.decode_tokens_per_second == 9


def test_what_does_not_fit_leaves_the_rest(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_whole(base, CPU)
    whole = Decoder.prefill

    def small(self: Decoder, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, ids)

    monkeypatch.setattr(Decoder, "prefill", small)
    speeds = list(measure(model, [Request(b, 4, 3) for b in (1, 2, 3)], ["graphs", "eager"], repeats=1))
    assert [speed.error for speed in speeds] == [
        *["CUDA graphs need a GPU, the model is on cpu"] * 3,
        "",
        "out of memory at batch 2",
        "",
    ]
    result = run(base, "--json")
    assert result.exit_code == 0
    assert [row["error"] for row in json.loads(result.stdout)["rows"]] == ["", "out of memory at batch 2"]
    assert f"{base}, eager: out of memory at batch 2" in run(base).stdout
    assert "nothing was measured: out of memory at batch 2" in refused(base, "--batch", 2)

    def uncompiled(self: Decoder, ids: torch.Tensor) -> torch.Tensor:
        raise TorchDynamoException("no compiler\nat great length")

    monkeypatch.setattr(Decoder, "prefill", uncompiled)
    assert [s.error for s in measure(model, [Request(1, 4, 3)], ["compile"])] == ["torch.compile failed: no compiler"]

    def broken(self: Decoder, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(Decoder, "prefill", broken)
    with pytest.raises(RuntimeError, match="something else"):
        list(measure(model, [Request(1, 4, 3)], ["eager"]))


def test_an_interrupted_run_keeps_what_is_finished(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Decoder.prefill

    def small(self: Decoder, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) == 2:
            raise KeyboardInterrupt
        return whole(self, ids)

    monkeypatch.setattr(Decoder, "prefill", small)
    result = run(base, "--json")
    assert result.exit_code == 2 and "interrupted: the figures above" in result.stderr
    content = json.loads(result.stdout)
    assert content["complete"] is False and [row["batch"] for row in content["rows"]] == [1]


def test_bad_inputs(base: Path) -> None:
    message = "200 prompt and 100 new tokens are 300, the model's context (max_position_embeddings) holds 256"
    assert message in refused(base, "--prompt", 200, "--new-tokens", 100)
    assert "'1,x': expected numbers from 1 with commas between" in refused(base, "--batch", "1,x")
    assert "no such directory" in refused("./nowhere")
    with pytest.raises(InputError, match="new_tokens: got 1, expected at least 2"):
        require_room(object(), [Request(1, 4, 1)], "model")


def test_modes_follow_options_and_device() -> None:
    assert modes_of("cuda", graphs=True, compiled=False) == ["eager", "graphs"]
    assert modes_of("cuda", graphs=True, compiled=True) == ["eager", "graphs", "compile+graphs"]
    assert modes_of("cuda", graphs=False, compiled=True) == ["eager", "compile"]
    assert modes_of("cpu", graphs=True, compiled=False) == ["eager"]


def test_ratios_only_between_finished_rows() -> None:
    def row(model: str, batch: int, speed: float, error: str = "") -> dict[str, Any]:
        rates = {"prefill_tokens_per_second": 2 * speed, "decode_tokens_per_second": speed}
        return {"model": model, "mode": "graphs", "batch": batch, "error": error} | rates

    rows = [row("a", 1, 30), row("a", 2, 0, "out of memory"), row("b", 1, 10), row("b", 2, 10)]
    content: dict[str, Any] = {"model": "a", "baseline": "b", "rows": rows, "models": []}
    add_ratios(content)
    ratio = {"mode": "graphs", "batch": 1, "prefill_tokens_per_second": 3.0, "decode_tokens_per_second": 3.0}
    assert content["ratios"] == [ratio]


def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_checkpoint", repository / "scripts/make_random_checkpoint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_random_checkpoints_load_and_stay_finite(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = script(repository)
    tokenizer = repository / "examples" / "tiny-llama"
    for name, options in (("plain", ["--tokenizer", tokenizer]), ("ours", ["--quantized"])):
        arguments = [tmp_path / name, "--shape", "tiny", "--layers", 2, "--device", "cpu", *options]
        monkeypatch.setattr(sys, "argv", ["make_random_checkpoint.py", *map(str, arguments)])
        assert make.main() == 0 and "GB in" in capsys.readouterr().out
        model = load_whole(tmp_path / name, CPU)
        assert any(isinstance(module, MarlinLinear) for module in model.modules()) is (name == "ours")
        with torch.no_grad():
            output = model(torch.randint(0, 8192, (2, 40)), output_hidden_states=True)
        assert all(0.01 < float(hidden.std()) < 20 for hidden in output.hidden_states)
        assert torch.isfinite(output.logits).all() and float(output.logits.std()) > 0.1
    assert {file.name for file in (tmp_path / "plain").glob("*token*")} == {"tokenizer.model", "tokenizer_config.json"}
    codes = load_file(tmp_path / "ours" / "model.safetensors")["model.layers.0.mlp.up_proj.qweight"]
    assert codes.unique().numel() > 0.99 * codes.numel()
    assert memory(model)["linears"] == 2 * (4 * 256 + 3 * 768) * 256 * (4 + 16 / 128) / 8
    assert make.main() == 2 and "exists already" in capsys.readouterr().err
