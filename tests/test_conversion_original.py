"""conversion/original.py: state dicts of the original Marlin repository, written and read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import save_foreign
from helpers_conversion import logits, quantized, same

import marlin_gptq
from marlin_gptq import InputError, convert_checkpoint
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.eval.original_checkpoint import load_original


@pytest.mark.parametrize("group_size", [128, -1])
def test_original_state_dicts(tmp_path: Path, group_size: int) -> None:
    marlin = quantized(tmp_path / "marlin", group_size)
    file = tmp_path / "model.marlin.g128"
    convert_checkpoint(marlin, file, "original")
    content = torch.load(file, weights_only=True)
    store = TensorStore(marlin)
    for name in [name.removesuffix(".qweight") for name in store.names if name.endswith(".qweight")]:
        assert torch.equal(content.pop(f"{name}.B"), store.get(f"{name}.qweight"))
        assert torch.equal(content.pop(f"{name}.s"), store.get(f"{name}.scales"))
    assert set(content) <= set(store.names)

    base = tmp_path / "marlin-base"
    assert torch.equal(logits(load_original(base, file)), logits(marlin_gptq.load(marlin)))
    assert torch.equal(logits(marlin_gptq.load(file, base=base)), logits(marlin_gptq.load(marlin)))
    convert_checkpoint(file, tmp_path / "back", "marlin", base=base)
    same(tmp_path / "back", marlin)
    with pytest.raises(InputError, match="exists already"):
        convert_checkpoint(marlin, file, "original")
    with pytest.raises(InputError, match="give the model it was made from as base"):
        convert_checkpoint(file, tmp_path / "other", "gptq")
    with pytest.raises(InputError, match="is quantized itself"):
        marlin_gptq.load(file, base=marlin)
    assert not list(tmp_path.glob(".*partial*"))


def test_what_the_original_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="q_proj: original cannot hold groups of 32: it knows 128 and -1"):
        convert_checkpoint(quantized(tmp_path / "marlin"), tmp_path / "file", "original")
    save_foreign(tmp_path / "awq", "awq", symmetric=False, group_size=128)
    with pytest.raises(InputError, match="q_proj: original cannot hold its zero points: the symmetric form has none"):
        convert_checkpoint(tmp_path / "awq", tmp_path / "file", "original")
