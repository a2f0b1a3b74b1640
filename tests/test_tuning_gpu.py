"""The end-to-end tuning on a GPU: the recorded step against the direct one, and the whole stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from transformers import AutoModelForCausalLM

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.tuning import end_to_end
from marlin_gptq.tuning.end_to_end import Rates, teacher_hidden, tune
from marlin_gptq.tuning.replay import Direct
from marlin_gptq.tuning.student import Student
from marlin_gptq.tuning.text import windows

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("tune_codes", [True, False])
def test_recorded_steps_are_the_direct_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune_codes: bool) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    quantize_model(source, tmp_path / "rtn", QuantizationConfig(method="rtn", group_size=64), [], device=GPU)
    text = windows(random_samples(60), 64)
    teacher = teacher_hidden(BlockStream(source, device=GPU), text, 4)
    curves = []
    for direct in (False, True):
        if direct:
            monkeypatch.setattr(end_to_end, "Replayed", Direct)
        student = Student(source, tmp_path / "rtn", tune_codes=tune_codes, length=64, device=GPU)
        assert student.recordable
        curves.append(tune(student, text, teacher, steps=30, batch=4, rates=Rates(), seed=0))
    recorded, plain = (torch.tensor(curve) for curve in curves)
    torch.testing.assert_close(recorded, plain, rtol=0.1, atol=1e-6)
    assert float(recorded[-5:].mean()) < float(recorded[:5].mean())


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_presets_write_a_better_model(tmp_path: Path, preset: str) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    settings = QuantizationConfig.from_preset(preset, group_size=64, tune_steps=60, tune_batch=4)
    samples = random_samples(60, longest=256)
    report = quantize_model(source, tmp_path / "out", settings, samples, device=GPU)
    assert report.tuning is not None and report.tuning["kl_after"] < report.tuning["kl_before"]
    assert report.peak_gpu_bytes is not None and report.peak_gpu_bytes > 0
    assert all(cost["peak_gpu_bytes"] for cost in report.costs.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cuda")
    with torch.no_grad():
        assert bool(model(samples[0][None].cuda()).logits.isfinite().all())
