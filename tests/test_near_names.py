"""near_names.py: what somebody may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from marlin_gptq.model_directory import is_model
from marlin_gptq.near_names import near, near_path


def test_near_words() -> None:
    assert near("bst", ("best", "marlin")) == ", did you mean best?"
    assert near("BEST", ("best", "marlin")) == ", did you mean best?"
    assert near("xyz", ("best", "marlin")) == ""


def test_near_paths_are_spelled_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zoo/llama-7b", "zoo/llama-notes"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "zoo" / "llama-7b" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    for given, meant in (
        ("zoo/lama-7b", "zoo/llama-7b"),
        ("./zoo/Llama-7B", "./zoo/llama-7b"),
        ("zo/llama-7b/", "zoo/llama-7b"),
        (f"{tmp_path}/zoo/llama7b", f"{tmp_path}/zoo/llama-7b"),
    ):
        assert near_path(given, is_model) == f", did you mean {meant}?"
    for given in ("zoo/mistral", "nowhere/at/all", "zo/lama-7b", "zoo/llama-7b", "", "/"):
        assert near_path(given, is_model) == ""
    assert near_path("zoo/llama-note") == ", did you mean zoo/llama-notes or zoo/llama-7b?"
