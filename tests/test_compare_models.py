"""scripts/compare_models.py: the divergence behind the README's table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def divergence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_models

    return compare_models.divergence


def test_divergence_is_torchs_and_has_its_direction(divergence) -> None:
    reference, other = torch.randn(2, 1, 7, 50).unbind()
    expected = torch.nn.functional.kl_div(
        other.double().log_softmax(-1), reference.double().log_softmax(-1), reduction="sum", log_target=True
    )
    kl, same = divergence(reference, other)
    assert kl == pytest.approx(float(expected))
    assert kl != pytest.approx(divergence(other, reference)[0], rel=1e-3)
    assert same == int((reference.argmax(-1) == other.argmax(-1)).sum())


def test_a_model_does_not_diverge_from_itself(tiny_llama: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "compare_models.py"), str(tiny_llama), str(tiny_llama)]
    done = subprocess.run(
        [*command, "--windows", "1", "--seq-len", "64", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kl_nats"] == pytest.approx(0, abs=1e-12)
    assert result["top1_percent"] == 100
    assert result["tokens"] == 64
