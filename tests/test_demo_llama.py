"""scripts/demo_llama.py computes what transformers computes with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@torch.no_grad()
def test_training_model_agrees_with_transformers(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from demo_llama import Llama
    from train_demo_model import PRESETS
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = Llama(PRESETS["tiny"].shape)
    model.load_state_dict({k: v for k, v in expected.state_dict().items() if k != "lm_head.weight"})
    ids = torch.randint(3, 8192, (2, 33))
    logits = expected(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(model(ids[:, :-1], ids[:, 1:])) == pytest.approx(float(loss), rel=1e-5)


def test_learning_rate_rises_then_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from train_demo_model import learning_rate_factor

    assert learning_rate_factor(0.0) < 0.01
    assert learning_rate_factor(0.02) == pytest.approx(1, abs=0.01)
    assert learning_rate_factor(1.0) == pytest.approx(0.02)
