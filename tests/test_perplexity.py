"""Perplexity against a slow twin: the plain transformers forward, window by window."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from character_model import save_character_model
from torch import Tensor

from marlin_gptq.calibration import load_tokenizer, token_ids
from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.eval import perplexity as module
from marlin_gptq.eval.perplexity import evaluate_perplexity, stream_nll
from marlin_gptq.eval.windows import equal_length_batches, text_windows

CPU = torch.device("cpu")
TEXT = "The quick brown fox jumps over the lazy dog, and then it rests. " * 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_character_model(tmp_path_factory.mktemp("character-model"))


def plain_nll(model_dir: Path, windows: list[Tensor]) -> tuple[float, int]:
    """(summed NLL, scored tokens) by the model's own forward, one window at a time, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            log_probabilities = model(window[None]).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_probabilities.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    return total, count


def test_whole_text_equals_the_plain_forward(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    result = evaluate_perplexity(model_dir, str(tmp_path / "text.txt"), 100, device=CPU)
    ids = token_ids(load_tokenizer(model_dir), TEXT)
    assert len(ids) == 769 and ids[0] == 1  # <s> and one token a character
    nll, count = plain_nll(model_dir, list(ids[:700].view(7, 100)))
    assert (result.windows, result.tokens) == (7, 7 * 99) == (7, count)
    assert result.nll == pytest.approx(nll / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert result.kernel == "full precision (no quantized layers)"
    assert "7 non-overlapping windows of 100, tail of 69 dropped" in result.protocol
    assert result.tokens_per_second > 0


def test_documents_are_weighted_by_token(model_dir: Path, tmp_path: Path) -> None:
    texts = ["short one", TEXT[:250], "x", "", "a second short"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = evaluate_perplexity(model_dir, str(path), 100, device=CPU)
    tokenizer = load_tokenizer(model_dir)
    windows = [w for text in texts for w in token_ids(tokenizer, text).split(100) if len(w) >= 2]
    nll, count = plain_nll(model_dir, windows)
    assert (result.windows, result.tokens) == (6, count)  # 251 tokens are three windows; "" is <s> alone
    assert result.nll == pytest.approx(nll / count, rel=1e-5)
    assert "5 documents, each in" in result.protocol


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_and_chunks_change_nothing(
    model_dir: Path, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    one = evaluate_perplexity(model_dir, str(tmp_path / "text.txt"), 64, device=CPU)
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", {"cpu": 96 * 7 * batch_size})
    other = evaluate_perplexity(model_dir, str(tmp_path / "text.txt"), 64, device=CPU, batch_size=batch_size)
    assert other.nll == pytest.approx(one.nll, rel=1e-6)


def test_tiny_llama_equals_the_plain_forward(tiny_llama: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = evaluate_perplexity(
        tiny_llama, "wikitext2", 128, device=CPU, limit=3, progress=lambda *step: steps.append(step)
    )
    windows, _ = text_windows(load_tokenizer(tiny_llama), "wikitext2", 128, n_samples=None, seed=0, offline=True)
    nll, count = plain_nll(tiny_llama, windows[:3])
    assert result.tokens == count == 3 * 127
    assert result.nll == pytest.approx(nll / count, rel=1e-5)
    assert "LIMITED to the first 3 windows" in result.protocol
    assert steps[-1][0] == steps[-1][1] == len(steps)


@pytest.mark.slow
@pytest.mark.parametrize(("seq_len", "figure"), [(1024, 48.73), (2048, 45.66)])
def test_tiny_llama_has_its_known_perplexity(tiny_llama: Path, seq_len: int, figure: float) -> None:
    assert round(evaluate_perplexity(tiny_llama, "wikitext2", seq_len, device=CPU).perplexity, 2) == figure


def test_the_default_window_is_the_models_context(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert evaluate_perplexity(model_dir, str(tmp_path / "text.txt"), device=CPU).seq_len == 256


def test_a_chosen_subset_depends_on_the_seed(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in range(3, 60)))
    tokenizer = load_tokenizer(model_dir)

    def lengths(seed: int) -> list[int]:
        windows, protocol = text_windows(tokenizer, str(path), 99, n_samples=5, seed=seed, offline=True)
        assert f"5 documents chosen by seed {seed}" in protocol
        return [len(window) for window in windows]

    assert len(lengths(0)) == 5
    assert lengths(0) == lengths(0) != lengths(1)


def test_batches_hold_windows_of_one_length() -> None:
    windows = [torch.arange(n) for n in (5, 9, 5, 5, 9, 2)]
    batches = equal_length_batches(windows, None, tokens_per_batch=10)
    assert [tuple(batch.shape) for batch in batches] == [(1, 9), (1, 9), (2, 5), (1, 5), (1, 2)]


class BrokenStream:
    """A model whose block, or whose head, answers with Inf."""

    n_blocks, device, dtype = 3, CPU, torch.float16
    config = SimpleNamespace(vocab_size=8, hidden_size=4)

    def __init__(self, place: Any) -> None:
        self.place = place

    def embed(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 4)

    def block(self, index: int) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def run(self, index: int, hidden: Tensor) -> Tensor:
        return hidden + math.inf if index == self.place else hidden

    def head(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(*hidden.shape[:2], 8)
        return logits + math.inf if self.place == "head" else logits


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (1, "decoder block 1: its output holds NaN or Inf computed in float16; try --dtype bfloat16"),
        ("head", "output head: its logits hold NaN or Inf computed in float16"),
    ],
)
def test_numbers_that_overflow_are_located(place: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        stream_nll(BrokenStream(place), [torch.zeros(5, dtype=torch.int64)])  # type: ignore[arg-type]


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    nll = stream_nll(BrokenStream(None), [torch.zeros(5, dtype=torch.int64)])  # type: ignore[arg-type]
    assert nll == pytest.approx(4 * math.log(8))


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ("short", ".txt", r"has 6 tokens, fewer than one window of 100; give more text or a smaller seq_len"),
        ("", ".txt", r"has 1 tokens, fewer than one window"),
        ("", ".jsonl", r"is empty; perplexity needs a document of 2 or more tokens"),
        ('{"text": ""}', ".jsonl", r"has 1 documents of at most 1 token\(s\); perplexity needs one of 2 or more"),
    ],
)
def test_texts_too_short_to_score(model_dir: Path, tmp_path: Path, content: str, suffix: str, message: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        evaluate_perplexity(model_dir, str(path), 100, device=CPU)


def test_bad_arguments(model_dir: Path) -> None:
    with pytest.raises(InputError, match=r"seq_len: got 512, the model's context .* holds 256 tokens"):
        evaluate_perplexity(model_dir, "demo", 512, device=CPU)
    with pytest.raises(InputError, match="batch_size: got 0, expected at least 1"):
        evaluate_perplexity(model_dir, "demo", device=CPU, batch_size=0)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    directory = save_character_model(tmp_path / "model", vocab_size=64)
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(InputError, match=r"got token \d+, the model's vocabulary has 64; the tokenizer .* another"):
        evaluate_perplexity(directory, str(tmp_path / "text.txt"), 100, device=CPU)


@pytest.mark.gpu
def test_hidden_states_on_the_host_change_nothing(model_dir: Path, tmp_path: Path) -> None:
    from marlin_gptq.modeling.blocks import BlockStream

    stream = BlockStream(model_dir, device=torch.device("cuda"))
    windows = list(token_ids(load_tokenizer(model_dir), TEXT)[:700].view(7, 100))
    assert stream_nll(stream, windows, memory_share=0.0) == stream_nll(stream, windows)
