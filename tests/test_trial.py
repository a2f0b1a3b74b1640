"""modeling/trial.py: a packed block that does not run, or computes something else, is told of before the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_samples, save_tiny_model
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from marlin_gptq import block_run, block_solver
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import QuantizationError
from marlin_gptq.pipeline import quantize_model

CPU = torch.device("cpu")
METHODS = pytest.mark.parametrize("method", ["gptq", "rtn"])


def quantize(tmp_path: Path, method: str = "gptq", skip: tuple[str, ...] = (), name: str = "out", **more: Any) -> Path:
    source = tmp_path / "source"
    if not source.exists():
        save_tiny_model(source, attention_bias=True)
    samples = random_samples(4) if method == "gptq" else []
    quantize_model(source, tmp_path / name, QuantizationConfig(method=method, skip=skip, **more), samples, device=CPU)
    return tmp_path / name


@METHODS
def test_a_weight_that_the_model_reads_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    own = LlamaMLP.forward

    def forward(mlp: Any, x: Tensor) -> Tensor:
        return own(mlp, x.to(mlp.up_proj.weight.dtype))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    told = (
        r"model\.layers\.0\.mlp\.up_proj: the model does not run \('MarlinLinear' object has no attribute 'weight'\) "
        r"once it is packed.*--skip 'mlp\\\.up_proj' leaves it in full precision"
    )
    with pytest.raises(QuantizationError, match=told):
        quantize(tmp_path, method)
    assert not (tmp_path / "out").exists()
    assert quantize(tmp_path, method, skip=(r"mlp\.up_proj",)).exists()


@METHODS
def test_a_linear_that_computes_something_else_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    pack, calls = block_solver.pack, []

    def wrong(part: Any) -> tuple[Tensor, Tensor]:
        calls.append(part)
        qweight, scales = pack(part)
        return (qweight.roll(1, 0), scales) if len(calls) == 4 else (qweight, scales)

    monkeypatch.setattr(block_solver, "pack", wrong)
    with pytest.raises(QuantizationError, match=r"layers\.0\.self_attn\.o_proj: its outputs are .* away from those of"):
        quantize(tmp_path, method)


@METHODS
def test_the_trial_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    trial, states = block_run.require_running, []

    def watched(*arguments: Any) -> None:
        states.append(torch.random.get_rng_state())
        trial(*arguments)
        states.append(torch.random.get_rng_state())

    monkeypatch.setattr(block_run, "require_running", watched)
    tried = load_file(quantize(tmp_path, method) / "model.safetensors")
    assert len(states) == 2 and torch.equal(*states)
    monkeypatch.setattr(block_run, "require_running", lambda *_: None)
    untried = load_file(quantize(tmp_path, method, name="again") / "model.safetensors")
    assert tried.keys() == untried.keys() and all(torch.equal(tried[name], untried[name]) for name in tried)


def test_blocks_of_one_make_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another choice of linears makes another block of it."""
    tried: list[int] = []
    save_tiny_model(tmp_path / "source", num_hidden_layers=4)
    monkeypatch.setattr(block_run, "require_running", lambda _, index, *__: tried.append(index))
    quantize(tmp_path)
    quantize(tmp_path, skip=(r"layers\.2\.mlp",), name="mixed")
    assert tried == [0, 0, 2]
