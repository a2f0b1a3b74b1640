"""Divergence against a slow twin: the plain transformers forward, window by window, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from character_model import save_character_model
from torch import Tensor

from marlin_gptq.calibration import load_tokenizer
from marlin_gptq.errors import InputError
from marlin_gptq.eval import divergence as module
from marlin_gptq.eval.divergence import compare_models, kl_per_token_, ratio
from marlin_gptq.eval.perplexity import evaluate_perplexity
from marlin_gptq.eval.windows import text_windows

CPU = torch.device("cpu")
TEXT = "The quick brown fox jumps over the lazy dog, and then it rests. " * 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return save_character_model(folder / "one", seed=0), save_character_model(folder / "other", seed=1)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def log_probabilities(model_dir: Path, windows: list[Tensor]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(window[None]).logits[0].double().log_softmax(-1) for window in windows]


def test_kl_is_torchs_and_has_its_direction() -> None:
    p, q = torch.randn(2, 3, 7, 50).log_softmax(-1).unbind()
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(kl_per_token_(p.clone(), q.clone()), expected)
    assert not torch.allclose(kl_per_token_(q, p), expected, rtol=1e-2)


def test_ratio_and_its_standard_error() -> None:
    """With clusters of one size the ratio estimate is the plain mean of the clusters' means."""
    means = torch.tensor([0.5, 1.5, 0.25, 2.0], dtype=torch.float64)
    mean, error = ratio(10 * means, torch.full((4,), 10.0, dtype=torch.float64))
    assert mean == pytest.approx(float(means.mean()))
    assert error == pytest.approx(float(means.std()) / 2)
    assert ratio(means[:1], torch.ones(1, dtype=torch.float64)) == (0.5, None)
    uneven, _ = ratio(torch.tensor([9.0, 1.0]), torch.tensor([9.0, 1.0]))
    assert uneven == 1.0


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_the_comparison_equals_the_plain_forward(
    models: tuple[Path, Path], text: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", {"cpu": 96 * 2 * 17})
    steps: list[tuple[int, int]] = []
    found = compare_models(
        *models, text, 100, device=CPU, batch_size=batch_size, progress=lambda *step: steps.append(step)
    )
    windows, _ = text_windows(load_tokenizer(models[0]), text, 100, n_samples=None, seed=0, offline=True)
    q, p = (log_probabilities(directory, windows) for directory in models)
    kl = [(a.exp() * (a - b)).sum() for a, b in zip(p, q, strict=True)]
    same = [(a.argmax(-1) == b.argmax(-1)).sum() for a, b in zip(p, q, strict=True)]
    result = found.divergence
    assert result is not None and found.missing is None
    assert (result.tokens, result.windows) == (700, 7)
    assert result.kl_nats == pytest.approx(float(sum(kl)) / 700, rel=1e-4)
    assert result.top1_agreement_percent == pytest.approx(100 * float(sum(same)) / 700, abs=0.3)
    assert result.kl_nats_standard_error == pytest.approx(float(torch.stack(kl).std()) / 100 / math.sqrt(7), rel=1e-3)
    for one, directory in ((found.model, models[0]), (found.baseline, models[1])):
        alone = evaluate_perplexity(directory, text, 100, device=CPU)
        assert one.nll == pytest.approx(alone.nll, rel=1e-6)
        assert (one.tokens, one.windows, one.protocol) == (alone.tokens, alone.windows, alone.protocol)
    assert steps[-1][0] == steps[-1][1] == len(steps)


def test_a_model_does_not_diverge_from_itself(models: tuple[Path, Path], text: str) -> None:
    found = compare_models(models[0], models[0], text, 64, device=CPU).divergence
    assert found is not None
    assert found.kl_nats == found.kl_nats_standard_error == 0
    assert found.top1_agreement_percent == 100 and found.top1_agreement_percent_standard_error == 0


def test_two_runs_agree_in_every_digit(models: tuple[Path, Path], text: str) -> None:
    one, other = (compare_models(*models, text, 64, device=CPU).divergence for _ in range(2))
    assert one == other


def test_windows_of_different_lengths(models: tuple[Path, Path], tmp_path: Path) -> None:
    texts = [TEXT[:70], "short", TEXT[:250], "x"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = compare_models(*models, str(path), 100, device=CPU).divergence
    assert found is not None and found.tokens == sum(len(text) + 1 for text in texts)
    one = compare_models(*models, str(path), 100, device=CPU, limit=1).divergence
    assert one is not None and one.kl_nats_standard_error is None


def test_vocabularies_that_differ(models: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    larger = save_character_model(tmp_path / "larger", vocab_size=128)
    steps: list[tuple[int, int]] = []
    found = compare_models(models[0], larger, text, 64, device=CPU, progress=lambda *step: steps.append(step))
    assert found.divergence is None
    assert found.missing == "the vocabularies have 96 and 128 tokens, so the distributions cannot be compared"
    assert found.baseline.tokens == found.model.tokens
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]


def test_tokenizers_that_differ(models: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    other = save_character_model(tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = None  # no <s> in front
    file.write_text(json.dumps(content))
    found = compare_models(models[0], other, text, 64, device=CPU)
    assert found.divergence is None and "tokenize this text differently" in str(found.missing)


def test_divergence_can_be_left_out(models: tuple[Path, Path], text: str) -> None:
    found = compare_models(*models, text, 64, device=CPU, divergence=False)
    assert found.divergence is None and found.missing is None
    assert found.baseline.tokens == found.model.tokens


def test_bad_arguments(models: tuple[Path, Path], text: str) -> None:
    with pytest.raises(InputError, match="batch_size: got 0"):
        compare_models(*models, text, 64, device=CPU, batch_size=0)
    with pytest.raises(InputError, match="seq_len: got 512"):
        compare_models(*models, text, 512, device=CPU)


@pytest.mark.gpu
def test_on_a_gpu(models: tuple[Path, Path], text: str) -> None:
    cuda = compare_models(*models, text, 100, device=torch.device("cuda")).divergence
    cpu = compare_models(*models, text, 100, device=CPU).divergence
    assert cuda is not None and cpu is not None
    assert cuda.kl_nats == pytest.approx(cpu.kl_nats, rel=0.02)
