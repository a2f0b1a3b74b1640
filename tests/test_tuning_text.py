"""tuning/text.py: windows of the calibration text, and text that the model writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import random_samples, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_gptq import InputError, QuantizationError
from marlin_gptq.modeling import decoding
from marlin_gptq.tuning import text
from marlin_gptq.tuning.text import packed, windows, written_by_model


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
    assert told == [(0, count)] + [(min(first + batch, count), count) for first in range(0, count, batch)]
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
