"""tuning/stage.py: a whole run with the end-to-end tuning, and what it writes."""

from __future__ import annotations

import json
import logging
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.config import Override
from marlin_gptq.report import ProgressEvent
from marlin_gptq.tuning import end_to_end, stage
from marlin_gptq.tuning.text import windows

CPU = torch.device("cpu")
TUNED = QuantizationConfig.from_preset(
    "best",
    group_size=64,
    damp_percent=1.0,
    clip=False,
    refine_sweeps=0,
    tune_steps=20,
    tune_batch=4,
    tune_rate=3e-3,
    tune_scale_rate=1e-3,
    tune_written=4,
)


def test_batches_of_the_teacher_follow_the_width() -> None:
    small, large = (SimpleNamespace(hidden_size=h, intermediate_size=i) for h, i in ((512, 1536), (4096, 11008)))
    assert stage._teacher_batch(small, 1024, torch.device("cuda")) == 85
    assert stage._teacher_batch(large, 1024, torch.device("cuda")) == 11
    assert stage._teacher_batch(large, 1 << 20, torch.device("cuda")) == 1
    assert stage._teacher_batch(small, 1024, CPU) == 8


def test_the_stage_writes_a_better_model(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", attention_bias=True, initializer_range=0.1)
    events: list[ProgressEvent] = []
    samples = random_samples(30, longest=256)
    out = tmp_path / "out"
    report = quantize_model(source, out, TUNED, samples, device=CPU, progress=events.append)
    assert report.tuning is not None and report.tuning["kept"]
    assert report.tuning["kl_after"] < 0.95 * report.tuning["kl_before"]
    assert 0 < report.tuning["codes_changed"] < 0.5
    assert report.tuning["windows"] == sum(map(len, samples)) // 256 + 4
    assert {"write text", "teacher", "tune end to end", "hessians", "gptq"} <= set(report.costs)
    assert json.loads((out / "quantize_log.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["tune_steps"] == 20
    assert "KL before and after the tuning" in (out / "README.md").read_text()
    assert {event.stage for event in events} == {"calibrate", "quantize", "write", "write text", "teacher", "tune"}
    assert [event.done for event in events if event.stage == "tune"] == [0, 10, 20]
    assert report.tuning["rates"] == {"codes": 3e-3, "scales": 1e-3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    model = AutoModelForCausalLM.from_pretrained(out)
    full = AutoModelForCausalLM.from_pretrained(source)
    text = windows(samples, 256)[:1]  # the one kept aside
    with torch.no_grad():
        p, q = (torch.log_softmax(m(text).logits.float(), -1) for m in (full, model))
    found = float((p.exp() * (p - q)).sum(-1).mean())
    assert found == pytest.approx(report.tuning["kl_after"], rel=0.05)

    again = quantize_model(source, tmp_path / "again", TUNED, samples, device=CPU)
    assert again.tuning == report.tuning
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_rises_begins_again_more_slowly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    events: list[ProgressEvent] = []
    wild = replace(TUNED, tune_rate=0.5, tune_scale_rate=0.05, tune_steps=40)
    samples = random_samples(30, longest=256)
    with caplog.at_level(logging.WARNING):
        report = quantize_model(source, tmp_path / "out", wild, samples, device=CPU, progress=events.append)
    assert report.tuning is not None
    told = [record.getMessage() for record in caplog.records if "begins again" in record.getMessage()]
    begun = [event.done for event in events if event.stage == "tune"].count(0)
    assert told and begun == len(told) + 1
    assert re.fullmatch(
        r"tuning end to end begins again with learning rates of 0\.125 \(codes\) and 0\.0125 \(scales and norms\), a "
        r"quarter of what they were: the KL that is learnt from went from 0\.\d+ to [\d.]+",
        told[0],
    )
    assert report.tuning["rates"] == {"codes": 0.5 / 4 ** len(told), "scales": 0.05 / 4 ** len(told)}
    assert report.tuning["kept"] and report.tuning["kl_after"] < report.tuning["kl_before"]


def test_a_loss_that_rises_whatever_the_rate_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def rising(*_: object) -> None:
        raise end_to_end.Diverged("it rose")

    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    samples = random_samples(30, longest=256)
    monkeypatch.setattr(end_to_end, "require_progress", rising)
    monkeypatch.setattr(stage, "mean_divergence", lambda *_: float("nan"))
    with caplog.at_level(logging.WARNING):
        report = quantize_model(source, tmp_path / "out", TUNED, samples, device=CPU)
    assert report.tuning is not None and not report.tuning["kept"]
    assert report.tuning["rates"]["codes"] == TUNED.tune_rate / 64
    assert caplog.text.count("begins again") == 3 and "did not help" in caplog.text


@pytest.mark.parametrize(
    ("before", "last", "rises"),
    [(1.0, [1.4, 1.6], False), (1.0, [1.0, 2.5], True), (1.0, [float("nan")], True), (0.0, [0.0], False)],
)
def test_what_counts_as_a_rise(before: float, last: list[float], rises: bool) -> None:
    with pytest.raises(end_to_end.Diverged) if rises else nullcontext():
        end_to_end.require_progress(before, last)


def test_tuning_that_does_not_help_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save_tiny_model(tmp_path / "source")
    harmful = replace(TUNED, tune_rate=0.5, tune_written=0, tune_steps=3)
    samples = random_samples(20)
    with caplog.at_level(logging.WARNING):
        report = quantize_model(source, tmp_path / "out", harmful, samples, device=CPU)
    assert report.tuning is not None and not report.tuning["kept"]
    assert "tuning end to end did not help: KL" in caplog.text
    quantize_model(source, tmp_path / "plain", replace(harmful, tune_steps=0), samples, device=CPU)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("mistral", {"sliding_window": 16}), ("qwen2", {}), ("qwen3", {"head_dim": 32})],
)
def test_other_families_tune_too(tmp_path: Path, architecture: str, changes: dict) -> None:
    source = save_tiny_model(tmp_path / "source", architecture, initializer_range=0.1, **changes)
    settings = replace(TUNED, tune_written=0, tune_steps=10, skip=("k_proj",))
    report = quantize_model(source, tmp_path / "out", settings, random_samples(20, longest=256), device=CPU)
    assert report.tuning is not None and report.tuning["codes_changed"] > 0
    assert report.tuning["kl_after"] < 1.5 * report.tuning["kl_before"]  # ten steps need not help yet
    assert not any(AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1].values())


def test_linears_with_settings_of_their_own_tune_too(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    rules = (Override("down_proj", 4, 32), Override(r"layers\.0\..*v_proj", 16))
    settings = replace(TUNED, tune_written=0, tune_steps=10, overrides=rules)
    report = quantize_model(source, tmp_path / "out", settings, random_samples(20, longest=256), device=CPU)
    assert report.tuning is not None and report.tuning["codes_changed"] > 0
    assert report.tuning["kl_after"] < 1.5 * report.tuning["kl_before"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.scales"].shape[0] == 256 // 32
    assert tensors["model.layers.1.mlp.up_proj.scales"].shape[0] == 128 // 64
    assert "model.layers.0.self_attn.v_proj.weight" in tensors
    assert not any(AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1].values())
