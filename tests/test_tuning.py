"""tuning/ and what it stands on: tunable weights, the divergence as a loss, the plan of memory, the whole stage."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_samples, random_weight, save_tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_gptq import InputError, QuantizationConfig, QuantizationError, quantize_model
from marlin_gptq.config import Override
from marlin_gptq.device_memory import free_bytes
from marlin_gptq.modeling import decoding
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.quantization.distillation import divergence
from marlin_gptq.quantization.gptq import rtn_quantize
from marlin_gptq.quantization.tunable import TunableWeight, clamp_
from marlin_gptq.quantization.tuning_steps import nearest
from marlin_gptq.report import ProgressEvent
from marlin_gptq.requirements import tuned_sizes
from marlin_gptq.tuning import stage, student, text
from marlin_gptq.tuning.end_to_end import (
    Rates,
    batches,
    host_memory,
    learning_rate,
    mean_divergence,
    teacher_hidden,
    tune,
)
from marlin_gptq.tuning.memory import Plan, Sizes, plan
from marlin_gptq.tuning.student import Student, use_one_kernel
from marlin_gptq.tuning.text import packed, windows, written_by_model

CPU = torch.device("cpu")
LENGTH = 32


# Tunable weights


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("moving", [True, False])
def test_a_tunable_weight_starts_as_the_quantized_one(group_size: int, moving: bool) -> None:
    weight = random_weight(12, 64, 0)
    quantized = rtn_quantize(weight, group_size=group_size, scale_dtype=torch.float16)
    quantized = replace(quantized, scales=quantized.scales * torch.tensor([[-1.0], [1.0]]).half().repeat(6, 1))
    tunable = TunableWeight(quantized, weight if moving else None)
    assert torch.equal(tunable.quantized().codes, quantized.codes)
    assert torch.equal(tunable.quantized().scales, quantized.scales)
    assert torch.equal(tunable(), quantized.dequantize())


def test_the_forward_is_what_will_be_stored_bit_for_bit() -> None:
    weight = random_weight(12, 64, 1)
    tunable = TunableWeight(rtn_quantize(weight, group_size=32, scale_dtype=torch.float16), weight)
    with torch.no_grad():
        tunable.shift.normal_(std=0.1)
        assert tunable.position is not None
        tunable.position.add_(torch.randn(12, 64))
        clamp_([tunable])
    stored = tunable.quantized()
    assert stored.scales.dtype == torch.float16 and stored.codes.dtype == torch.uint8
    assert int(stored.codes.max()) <= 15
    assert torch.equal(tunable(), stored.dequantize())


@pytest.mark.parametrize("moving", [True, False])
def test_a_weight_in_the_dtype_of_autocast_is_the_rounded_one(moving: bool) -> None:
    """Bit for bit, and with the gradients of a product that rounds it itself."""
    weight, x = random_weight(12, 64, 2), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    quantized = rtn_quantize(weight, group_size=32, scale_dtype=torch.float16)
    found, gradients = [], []
    for at_once in (True, False):
        tunable = TunableWeight(quantized, weight if moving else None)
        moved = [tunable.shift] if tunable.position is None else [tunable.shift, tunable.position]
        with torch.no_grad():
            for parameter in moved:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        clamp_([tunable])
        value = None if at_once else tunable()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(tunable() if value is None else value.bfloat16())
            torch.nn.functional.linear(x, found[-1]).float().square().sum().backward()
        gradients.append([parameter.grad for parameter in moved])
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], found[1])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_codes_are_the_nearest_in_range() -> None:
    position = torch.cat(
        [torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 6, torch.arange(-20, 20) / 2]
    )
    assert torch.equal(nearest(position), position.round().clamp(-8, 7))


def test_gradients_are_those_of_the_product_without_the_rounding() -> None:
    weight = random_weight(6, 64, 2)
    tunable = TunableWeight(rtn_quantize(weight, group_size=32, scale_dtype=torch.float16), weight)
    outer = torch.randn(6, 64)
    (tunable() * outer).sum().backward()
    codes = (tunable.quantized().codes.float() - 8).requires_grad_()
    scales = tunable.start.clone().requires_grad_()
    (codes * scales.repeat_interleave(32, dim=1) * outer).sum().backward()
    assert tunable.position is not None and tunable.position.grad is not None and tunable.shift.grad is not None
    torch.testing.assert_close(tunable.position.grad, codes.grad)
    torch.testing.assert_close(tunable.shift.grad, scales.grad * tunable.start)  # shift is relative
    fixed = TunableWeight(tunable.quantized())
    (fixed() * outer).sum().backward()
    assert fixed.position is None
    torch.testing.assert_close(fixed.shift.grad, tunable.shift.grad)


# The loss


@pytest.mark.parametrize("with_bias", [True, False])
def test_divergence_and_its_gradient_are_those_of_autograd(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin_gptq.quantization.distillation._LOGITS_AT_ONCE", 3 * 50)  # three rows at a time
    hidden, teacher, head = torch.randn(10, 8), torch.randn(10, 8), torch.randn(50, 8)
    bias = torch.randn(50) if with_bias else None
    ours, naive = hidden.clone().requires_grad_(), hidden.clone().double().requires_grad_()
    loss = divergence(ours, teacher, head, bias)
    (2 * loss).backward()
    wide = None if bias is None else bias.double()
    p = torch.log_softmax(torch.nn.functional.linear(teacher.double(), head.double(), wide), -1)
    q = torch.log_softmax(torch.nn.functional.linear(naive, head.double(), wide), -1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    (2 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert ours.grad is not None and naive.grad is not None
    torch.testing.assert_close(ours.grad.double(), naive.grad, rtol=1e-4, atol=1e-6)
    assert float(divergence(teacher, teacher, head, bias)) == pytest.approx(0, abs=1e-6)


# Text


def test_windows_are_the_documents_end_to_end() -> None:
    samples = [torch.arange(5), torch.arange(5, 12), torch.arange(12, 23)]
    assert torch.equal(windows(samples, 10), torch.arange(20).view(2, 10))
    assert [part.shape for part in packed([torch.arange(100)], 10, batch=4)] == [(4, 10), (4, 10), (2, 10)]
    with pytest.raises(InputError, match="samples: got 23 tokens, tuning needs at least one window of 24"):
        windows(samples, 24)


def test_written_text_follows_the_models_distribution(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "source"), dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1e4 * model.model.norm.weight.sign()  # one token outweighs all where norms point up
    samples = random_samples(5)
    first, again, other = (
        written_by_model(model, samples, count=6, length=24, batch=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first.shape == (6, 24) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    whole = torch.cat(samples).tolist()
    prompt = first[0, :16].tolist()
    assert any(whole[i : i + 16] == prompt for i in range(len(whole)))


@pytest.mark.parametrize(("count", "batch"), [(6, 6), (5, 2)])
def test_written_text_is_drawn_token_by_token(tmp_path: Path, count: int, batch: int) -> None:
    """The same draws from whole forward passes, without any cache."""
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny_model(tmp_path / "source", initializer_range=0.3), dtype=torch.float32
    ).eval()
    told: list[tuple[int, int]] = []
    written = written_by_model(
        model, random_samples(5), count=count, length=24, batch=batch, seed=3, progress=lambda *done: told.append(done)
    )
    assert told == [(min(first + batch, count), count) for first in range(0, count, batch)]
    generator = torch.Generator().manual_seed(3)
    for part in written.split(batch):
        ids = part[:, :16]
        for _ in range(8):
            with torch.no_grad():
                probabilities = torch.softmax(model(ids).logits[:, -1], dim=-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        assert torch.equal(ids, part)
    assert len(set(written[:, 16:].flatten().tolist())) > 8


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_cache_of_fixed_size_writes_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    """What a GPU records, step by step, its cache read in parts."""
    source = save_tiny_model(tmp_path / "source", initializer_range=0.3, num_key_value_heads=kv_heads)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def written() -> Tensor:
        return written_by_model(model, random_samples(5), count=5, length=40, batch=2, seed=3)

    growing = written()
    monkeypatch.setattr(decoding, "_MUCH", 1)
    monkeypatch.setattr(decoding, "_PART_OF", 4)
    monkeypatch.setattr(text, "Decoder", lambda *sizes, graphs: decoding.Decoder(*sizes, fixed=True))
    assert torch.equal(written(), growing)


def test_a_model_that_writes_nonsense_is_an_error(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "source"), dtype=torch.float32)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    with pytest.raises(QuantizationError, match=r"^logits: NaN or Inf in float32 after 24 tokens that the model wrote"):
        written_by_model(model, random_samples(5), count=2, length=24, batch=2, seed=0)


# The loop


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


def test_batches_of_the_teacher_follow_the_width() -> None:
    small, large = (SimpleNamespace(hidden_size=h, intermediate_size=i) for h, i in ((512, 1536), (4096, 11008)))
    assert stage._teacher_batch(small, 1024, torch.device("cuda")) == 85
    assert stage._teacher_batch(large, 1024, torch.device("cuda")) == 11
    assert stage._teacher_batch(large, 1 << 20, torch.device("cuda")) == 1
    assert stage._teacher_batch(small, 1024, CPU) == 8


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


def test_free_memory_counts_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 30)
    assert free_bytes(torch.device("cuda")) == 55


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


# Memory


LLAMA_7B = Sizes(6_476_005_376, 262_410_240, 128, 32, 4096, 11008)


def test_a_7b_fits_one_large_gpu_with_codes_and_a_small_one_without() -> None:
    whole = plan(LLAMA_7B, batch=16, length=1024, tune_codes=True, free=140 * 10**9)
    assert whole.checkpointing and whole.micro_batch >= 1 and whole.bytes < 126 * 10**9
    small = plan(LLAMA_7B, batch=16, length=1024, tune_codes=False, free=40 * 10**9)
    assert small.checkpointing and small.bytes < 36 * 10**9
    tiny = plan(Sizes(3 * 10**6, 2 * 10**6, 128, 4, 256, 768), batch=16, length=1024, tune_codes=True, free=2 * 10**10)
    assert (tiny.micro_batch, tiny.checkpointing) == (16, False)


def test_too_little_memory_is_one_sentence() -> None:
    with pytest.raises(QuantizationError, match=r"needs about \d+\.\d GB on the device and 24\.0 GB are free; use "):
        plan(LLAMA_7B, batch=16, length=1024, tune_codes=True, free=24 * 10**9)
    with pytest.raises(QuantizationError, match=r"are free; use --tune-steps 0$"):
        plan(LLAMA_7B, batch=1, length=1024, tune_codes=False, free=4 * 10**9)


def test_sizes_known_beforehand_are_those_of_the_student(pair: tuple, tmp_path: Path) -> None:
    before = tuned_sizes(pair[0], QuantizationConfig(group_size=64))
    assert before == student_of(pair).sizes()
    mixed = QuantizationConfig(group_size=64, overrides=(Override("down_proj", 4, 32), Override("k_proj", 16)))
    rounded = replace(mixed, method="rtn")
    quantize_model(pair[0], tmp_path / "mixed", rounded, [], device=CPU)
    student = Student(pair[0], tmp_path / "mixed", tune_codes=True, length=LENGTH, device=CPU)
    assert tuned_sizes(pair[0], mixed) == student.sizes() and student.sizes().group_size == 32
    assert before.weights == 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)


# The stage


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
    assert [event.done for event in events if event.stage == "tune"] == [10, 20]
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
    source = save_tiny_model(tmp_path / "source", architecture, **changes)
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


def test_corrected_targets_need_the_full_precision_stream(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    samples = random_samples(12)
    for name, share in (("none", 0.0), ("half", 0.5)):
        settings = QuantizationConfig(correct_target=share, true_sequential=True)
        quantize_model(source, tmp_path / name, settings, samples, device=CPU)
    none, half = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "half"))
    first, later = "model.layers.0.self_attn.q_proj.qweight", "model.layers.1.mlp.down_proj.qweight"
    assert torch.equal(none[first], half[first])  # nothing in front of it is quantized
    assert not torch.equal(none[later], half[later])


def test_the_full_precision_stream_passes_blocks_that_stay_as_they_are(tmp_path: Path) -> None:
    """After a block that nothing is quantized in, both streams are the same still, and there is nothing to correct."""
    source = save_tiny_model(tmp_path / "source")
    for share in (0.0, 1.0):
        settings = QuantizationConfig(correct_target=share, skip=(r"layers\.0\.",))
        quantize_model(source, tmp_path / str(share), settings, random_samples(12), device=CPU)
    none, full = (load_file(tmp_path / name / "model.safetensors") for name in ("0.0", "1.0"))
    assert all(torch.equal(none[name], full[name]) for name in none)
