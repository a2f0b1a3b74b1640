"""quantization/loops.py: which inner loops run, where, and what a run says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import tritons_interpreter
from click.testing import CliRunner
from helpers import random_samples, save_tiny_model
from torch import Tensor

from marlin_gptq import InputError, QuantizationConfig, pipeline, quantize_model
from marlin_gptq.cli.quantize import main
from marlin_gptq.quantization import descent, fused, grid, loops
from marlin_gptq.work_directory import WorkDirectory


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    tritons_interpreter.fresh_loops(monkeypatch)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), triton: str | None = "3.6") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fused, "triton_version", lambda: triton)


CUDA = torch.device("cuda", 0)


def test_plain_torch_runs_wherever_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "_trial", lambda *_: None)
    on_a_gpu(monkeypatch)
    assert loops.inner_loops(CUDA, 128, 128, torch.float16).name == "triton 3.6"
    assert loops.inner_loops(CUDA, 128, 128, torch.float16).best_scales is fused.best_scales
    assert loops.inner_loops(CUDA, 4096, 128, torch.float16).best_scales is grid.best_scales
    assert loops.inner_loops(CUDA, 4096, 128, torch.float16).push_errors is fused.push_errors
    assert loops.inner_loops(CUDA, 128, 128, torch.float16).refit_group is fused.refit_group
    assert loops.inner_loops(CUDA, 4096, 128, torch.float16).refit_group is descent.refit_group
    assert loops.inner_loops(CUDA, 4096, 128, torch.float16).descend_columns is fused.descend_columns
    assert loops.inner_loops(torch.device("cpu"), 128, 128, torch.float16) is loops.PLAIN
    assert loops.inner_loops(CUDA, 128, 256, torch.float16) is loops.PLAIN
    loops.set_fused(False)
    assert loops.inner_loops(CUDA, 128, 128, torch.float16) is loops.PLAIN
    loops.set_fused(True)
    on_a_gpu(monkeypatch, capability=(7, 5))
    assert loops.inner_loops(CUDA, 128, 128, torch.float16) is loops.PLAIN
    on_a_gpu(monkeypatch, triton=None)
    assert loops.inner_loops(CUDA, 128, 128, torch.float16) is loops.PLAIN


def test_a_failing_compiler_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("ptxas exploded:\nFailed to find C compiler.\n")

    on_a_gpu(monkeypatch)
    trial = loops._trial
    tries = []

    def on_the_cpu(tried: loops.Loops, device: torch.device, *rest: object) -> str | None:
        tries.append(rest)
        return trial(tried._replace(best_scales=broken), torch.device("cpu"), *rest)

    monkeypatch.setattr(loops, "_trial", on_the_cpu)
    for columns in (128, 64, 4096):
        assert loops.inner_loops(CUDA, columns, 128, torch.float16) is loops.PLAIN
    assert len(tries) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "GPTQ's inner loops run in plain torch, which is slower: the fused ones failed (RuntimeError: Failed to find C "
        "compiler.)"
    ]


def test_loops_that_compute_something_else_are_not_used() -> None:
    def trial(**changed: object) -> str | None:
        return loops._trial(loops.PLAIN._replace(**changed), torch.device("cpu"), 64, torch.float16)

    assert trial() is None
    wrong = trial(best_scales=lambda weight, whitener, scales: scales[:, -1:])
    assert wrong is not None and wrong.startswith("disagree with it on this GPU (equal: ")
    assert "disagree" in str(trial(quantize_columns=lambda *_: None))
    assert "disagree" in str(trial(push_errors=lambda *_: None))
    assert "disagree" in str(trial(push_errors=lambda rest, *_: rest.fill_(torch.nan)))
    assert "0% of refitted scales" in str(trial(refit_group=lambda *_: None))
    assert "of refined codes)" in str(trial(descend_columns=lambda *_: None))
    exact = descent.refit_group
    for wrong in (0, torch.nan):
        assert "disagree" in str(trial(refit_group=lambda *six, to=wrong: (exact(*six), six[4].fill_(to))))


@pytest.mark.gpu
def test_the_trial_passes_on_this_gpu(caplog: pytest.LogCaptureFixture) -> None:
    if fused.triton_version() is None:
        pytest.skip("needs Triton (it comes with torch's CUDA builds for Linux)")
    for dtype in (torch.float16, torch.bfloat16):
        for columns in (32, 64, 128, 4096):
            found = loops.inner_loops(torch.device("cuda"), columns, 128, dtype)
            assert found.name == f"triton {fused.triton_version()}"
    assert not caplog.records


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_run_says_which_loops_it_had(tmp_path: Path, switch: str) -> None:
    source = save_tiny_model(tmp_path / "source")
    loops.set_fused(switch == "1")
    report = quantize_model(
        source, tmp_path / "out", QuantizationConfig(), random_samples(4), device=torch.device("cuda")
    )
    name = f"triton {fused.triton_version()}" if switch == "1" and fused.triton_version() else "torch"
    assert report.inner_loops == name
    assert json.loads((tmp_path / "out" / "quantize_log.json").read_text())["inner_loops"] == name


def test_a_run_goes_on_with_the_loops_it_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "source")

    def run(work: WorkDirectory) -> None:
        with work:
            quantize_model(
                source, tmp_path / "out", QuantizationConfig(), random_samples(4), device=torch.device("cpu"),
                overwrite=True, work=work,
            )  # fmt: skip

    run(WorkDirectory.new(tmp_path / "work", {}))
    assert json.loads((tmp_path / "out" / "quantize_log.json").read_text())["inner_loops"] == "torch"
    monkeypatch.setattr(pipeline, "inner_loops", lambda *_: loops.PLAIN._replace(name="triton 3.6"))
    with pytest.raises(
        InputError, match=r"inner loops: the run in .* was begun with 'torch', and is now asked to go on"
    ):
        run(WorkDirectory.resume(tmp_path / "work"))


def test_the_switch_takes_0_and_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_model(tmp_path / "source")
    arguments = [str(source), "-o", str(tmp_path / "out"), "--method", "rtn", "--device", "cpu"]
    for value, on in (("0", False), ("1", True), ("", True)):
        result = CliRunner().invoke(main, [*arguments, "--overwrite"], env={"MARLIN_GPTQ_FUSED": value})
        assert result.exit_code == 0 and loops._enabled is on, result.output
    result = CliRunner().invoke(main, arguments, env={"MARLIN_GPTQ_FUSED": "off"})
    assert result.exit_code == 2
    assert "MARLIN_GPTQ_FUSED: got 'off', expected 0 (plain torch) or 1 (fused GPU kernels)" in result.output
