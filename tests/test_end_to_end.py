"""tuning/end_to_end.py and student.py: the teacher, the quantized model that learns from it, and the steps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_gptq import QuantizationConfig, quantize_model
from marlin_gptq.config import Override
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.requirements import tuned_sizes
from marlin_gptq.tuning import student
from marlin_gptq.tuning.end_to_end import (
    Rates,
    batches,
    host_memory,
    learning_rate,
    mean_divergence,
    teacher_hidden,
    tune,
)
from marlin_gptq.tuning.memory import Plan
from marlin_gptq.tuning.student import Student, use_one_kernel
from marlin_gptq.tuning.text import windows

CPU = torch.device("cpu")
LENGTH = 32


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor, Tensor]:
    """A model, its rounded copy, windows, and what the model's head sees of them."""
    folder = tmp_path_factory.mktemp("pair")
    source = save_tiny_model(folder / "source", tie_word_embeddings=True)
    quantize_model(source, folder / "rtn", QuantizationConfig(method="rtn", group_size=64), [], device=CPU)
    text = windows(random_samples(30), LENGTH)
    return source, folder / "rtn", text, teacher_hidden(BlockStream(source, device=CPU), text, 4)


def student_of(pair: tuple, tune_codes: bool = True) -> Student:
    return Student(pair[0], pair[1], tune_codes=tune_codes, length=LENGTH, device=CPU)


def test_the_student_is_the_quantized_model_and_the_teacher_the_full_one(pair: tuple) -> None:
    source, rounded, text, teacher = pair
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model.model(text[:2]).last_hidden_state
        torch.testing.assert_close(teacher[:2], expected, rtol=1e-4, atol=1e-4)
        stream = BlockStream(rounded, device=CPU)
        torch.testing.assert_close(
            student_of(pair).hidden(text[:2]), teacher_hidden(stream, text[:2], 2), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_norms_in_one_kernel_are_the_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    source = save_tiny_model(tmp_path / "source", architecture, **({"head_dim": 32} if architecture == "qwen3" else {}))
    quantize_model(source, tmp_path / "rtn", QuantizationConfig(method="rtn", group_size=64), [], device=CPU)
    found, used = [], []
    one_kernel = use_one_kernel
    for way in (lambda norm: used.append(one_kernel(norm)), lambda norm: None):
        monkeypatch.setattr(student, "use_one_kernel", way)
        model = Student(source, tmp_path / "rtn", tune_codes=True, length=LENGTH, device=CPU)
        moved = [parameter for kind in model.parameters().values() for parameter in kind]
        hidden = model.hidden(windows(random_samples(30), LENGTH)[:4])
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        found.append((hidden, [parameter.grad for parameter in moved]))
    assert all(used) and len(used) == (5 if architecture == "llama" else 9)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_norms_that_are_others_stay_as_they_are() -> None:
    class OneMore(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.eps)

    class Without(torch.nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x, (8,), self.weight, 1e-12)

    for norm in (OneMore(8, eps=1e-6), Without(8, eps=1e-6), torch.nn.LayerNorm(8), torch.nn.RMSNorm(8)):
        own = norm.forward
        assert not use_one_kernel(norm) and norm.forward == own
    assert use_one_kernel(torch.nn.RMSNorm(8, eps=1e-6))


def test_the_teacher_does_not_depend_on_the_batch(pair: tuple) -> None:
    for batch in (1, len(pair[2]) - 1, 1000):
        found = teacher_hidden(BlockStream(pair[0], device=CPU), pair[2], batch)
        torch.testing.assert_close(found, pair[3], rtol=1e-4, atol=1e-4)


def test_host_memory_that_cannot_be_page_locked_is_pageable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, pages = torch.empty, {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 7}

    def empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool = False) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error:\n not today")
        return whole(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(os, "sysconf", pages.get)
    assert host_memory((3, 1000), torch.float32).shape == (3, 1000)  # 12,000 bytes, 16,384 page-locked
    assert "not page-locked (0.0 GB would be, and 0.0 GB are free)" in caplog.text
    pages["SC_AVPHYS_PAGES"] = 8
    assert host_memory((3, 1000), torch.float32).shape == (3, 1000)
    assert "not page-locked (CUDA error: not today)" in caplog.text


@pytest.mark.parametrize("tune_codes", [True, False])
def test_tuning_lowers_the_divergence(pair: tuple, tune_codes: bool) -> None:
    _, _, text, teacher = pair
    student = student_of(pair, tune_codes)
    before = mean_divergence(student, text, teacher)
    codes = {name: layer.quantized().codes for name, layer in student.layers.items()}
    rates = Rates(scales=1e-3, norms=1e-3, codes=3e-3)
    losses = tune(student, text, teacher, steps=40, batch=8, rates=rates, seed=0)
    after = mean_divergence(student, text, teacher)
    assert len(losses) == 40 and losses[0] == pytest.approx(before, rel=0.5)
    assert after < (0.7 if tune_codes else 0.97) * before
    same = all(torch.equal(layer.quantized().codes, codes[name]) for name, layer in student.layers.items())
    assert same != tune_codes


def test_a_step_in_parts_or_with_recomputed_activations_is_the_same_step(pair: tuple) -> None:
    _, _, text, teacher = pair
    results = []
    for cut in (Plan(4, False, 0), Plan(1, False, 0), Plan(2, True, 0)):
        student = student_of(pair)
        losses = tune(student, text, teacher, steps=3, batch=4, rates=Rates(), seed=1, cut=cut)
        results.append(
            (torch.tensor(losses), torch.cat([layer.shift.detach().flatten() for layer in student.layers.values()]))
        )
    for found, moved in results[1:]:
        torch.testing.assert_close(found, results[0][0], rtol=1e-4, atol=1e-8)
        assert float((moved - results[0][1]).abs().mean()) < 1e-5  # Adam makes ±rate of gradients near 0


def test_order_and_rate_of_steps() -> None:
    chosen = torch.cat(list(batches(10, 4, 5, seed=3)))
    assert sorted(chosen[:10].tolist()) == sorted(chosen[10:].tolist()) == list(range(10))
    assert torch.equal(chosen, torch.cat(list(batches(10, 4, 5, seed=3))))
    rates = [learning_rate(step, 100) for step in range(100)]
    assert rates[0] == 0.2 and max(rates) == 1 and rates[4] == 1 and 0 < rates[-1] < 0.001
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_sizes_known_beforehand_are_those_of_the_student(pair: tuple, tmp_path: Path) -> None:
    before = tuned_sizes(pair[0], QuantizationConfig(group_size=64))
    assert before == student_of(pair).sizes()
    mixed = QuantizationConfig(group_size=64, overrides=(Override("down_proj", 4, 32), Override("k_proj", 16)))
    rounded = replace(mixed, method="rtn")
    quantize_model(pair[0], tmp_path / "mixed", rounded, [], device=CPU)
    student = Student(pair[0], tmp_path / "mixed", tune_codes=True, length=LENGTH, device=CPU)
    assert tuned_sizes(pair[0], mixed) == student.sizes() and student.sizes().group_size == 32
    assert before.weights == 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
