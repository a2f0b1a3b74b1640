"""The end-to-end tuning on a GPU: the recorded step against the direct one, and the whole stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from transformers import AutoModelForCausalLM

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.device_memory import free_bytes, give_back
from marlin_gptq.modeling import decoding
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.tuning import end_to_end, text
from marlin_gptq.tuning.end_to_end import Rates, teacher_hidden, tune
from marlin_gptq.tuning.replay import Direct
from marlin_gptq.tuning.student import Student
from marlin_gptq.tuning.text import windows, written_by_model

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.mark.parametrize("tune_codes", [True, False])
def test_recorded_steps_are_the_direct_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune_codes: bool) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    quantize_model(source, tmp_path / "rtn", QuantizationConfig(method="rtn", group_size=64), [], device=GPU)
    ids = windows(random_samples(60), 64)
    teacher = teacher_hidden(BlockStream(source, device=GPU), ids, 4)
    curves = []
    for direct in (False, True):
        if direct:
            monkeypatch.setattr(end_to_end, "Replayed", Direct)
        student = Student(source, tmp_path / "rtn", tune_codes=tune_codes, length=64, device=GPU)
        assert student.recordable
        curves.append(tune(student, ids, teacher, steps=30, batch=4, rates=Rates(), seed=0))
    recorded, plain = (torch.tensor(curve) for curve in curves)
    torch.testing.assert_close(recorded, plain, rtol=0.1, atol=1e-6)
    assert float(recorded[-5:].mean()) < float(recorded[:5].mean())


@pytest.mark.parametrize("locked", [True, False])
def test_a_teacher_on_the_host_is_the_one_on_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    quantize_model(source, tmp_path / "rtn", QuantizationConfig(method="rtn", group_size=64), [], device=GPU)
    ids = windows(random_samples(60), 64)
    here = teacher_hidden(BlockStream(source, device=GPU), ids, 4)
    monkeypatch.setattr(end_to_end, "free_bytes", lambda _: 0)
    if not locked:
        monkeypatch.setattr(end_to_end, "host_memory", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    there = teacher_hidden(BlockStream(source, device=GPU), ids, 4)
    assert here.is_cuda and not there.is_cuda and there.is_pinned() is locked
    assert torch.equal(here.cpu(), there)
    curves = []
    for teacher in (here, there):
        student = Student(source, tmp_path / "rtn", tune_codes=True, length=64, device=GPU)
        curves.append(torch.tensor(tune(student, ids, teacher, steps=10, batch=4, rates=Rates(), seed=0)))
    torch.testing.assert_close(curves[0], curves[1], rtol=0.02, atol=1e-6)


def test_free_memory_counts_what_torch_keeps() -> None:
    give_back(GPU)
    before = free_bytes(GPU)
    kept = torch.empty(1 << 28, dtype=torch.uint8, device=GPU)
    with_it = free_bytes(GPU)
    del kept  # torch keeps the memory
    assert torch.cuda.memory_reserved(GPU) >= 1 << 28
    # Other processes may take or free memory meanwhile.
    assert before - with_it == pytest.approx(1 << 28, abs=1 << 26)
    assert free_bytes(GPU) == pytest.approx(before, abs=1 << 26)


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_tuning_writes_a_better_model(tmp_path: Path, preset: str) -> None:
    """By either way to cut windows: those of `best`, and the packed samples of `fast`."""
    source = save_tiny_model(tmp_path / "source", initializer_range=0.1)
    changes = {"tune_steps": 60, "tune_batch": 4, "tune_rate": 5e-4, "tune_block_steps": 0}
    settings = QuantizationConfig.from_preset(preset, group_size=64, **changes)
    samples = random_samples(60, longest=256)
    report = quantize_model(source, tmp_path / "out", settings, samples, device=GPU)
    assert report.tuning is not None and report.tuning["kl_after"] < report.tuning["kl_before"]
    assert report.peak_gpu_bytes is not None and report.peak_gpu_bytes > 0
    # Nothing may be on the GPU yet when a run opens its files; all else works there.
    assert all(cost["peak_gpu_bytes"] or name == "open" for name, cost in report.costs.items())
    assert all(cost["peak_gpu_bytes"] is not None for cost in report.costs.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cuda")
    with torch.no_grad():
        assert bool(model(samples[0][None].cuda()).logits.isfinite().all())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_recorded_text_is_drawn_as_the_direct_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    source = save_tiny_model(tmp_path / "source", initializer_range=0.3, num_key_value_heads=kv_heads)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map="cuda").eval()
    assert text._recorded(model, 64)

    def written() -> torch.Tensor:
        return written_by_model(model, random_samples(5), count=100, length=64, batch=64, seed=0)

    first, again = written(), written()
    monkeypatch.setattr(text, "_recorded", lambda *_: False)
    direct = written()
    monkeypatch.undo()
    monkeypatch.setattr(decoding, "_MUCH", 1)  # the cache read in parts: 64 places of 64 otherwise
    monkeypatch.setattr(decoding, "_PART_OF", 8)
    parted = written()
    assert torch.equal(first[:, :16], parted[:, :16])
    assert float((first[:64, 16:20] == parted[:64, 16:20]).float().mean()) > 0.9
    assert torch.equal(first, again) and torch.equal(first[:, :16], direct[:, :16])
    # A draw between two tokens may fall the other way by the rounding of sums, and the text behind it is another.
    assert float((first[:64, 16:20] == direct[:64, 16:20]).float().mean()) > 0.9
