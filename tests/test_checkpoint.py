"""checkpoint.py: reading lazily, and a clear word for each broken file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_model

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.errors import CheckpointError
from marlin_gptq.model_directory import SAFETENSORS_INDEX


def test_single_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    one = TensorStore(save_tiny_model(tmp_path / "one"))
    many = TensorStore(save_tiny_model(tmp_path / "many", shard_size="200KB"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert sorted(one.names) == sorted(many.names)
    for name in one.names:
        assert torch.equal(one.get(name), many.get(name))
        assert one.shape(name) == tuple(many.get(name).shape)
        assert many.dtype(name) == torch.float16
        assert one.size(name) == one.get(name).numel() * 2


def test_legacy_pickles_are_read_weights_only(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.float16)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    store = TensorStore(tmp_path)
    assert torch.equal(store.get("a"), tensors["a"]) and store.shape("b") == (2, 3)
    assert store.dtype("b") == torch.float16 and store.size("a") == 16

    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a readable weights-only pickle"):
        TensorStore(tmp_path)
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        TensorStore(tmp_path)


def test_truncated_and_corrupt_files_are_named(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model")
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], content[:4], b"", b"\xff" * 100):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt"):
            TensorStore(directory)


def test_missing_shards_tensors_and_indexes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors, no pytorch_model\.bin"):
        TensorStore(tmp_path)
    directory = save_tiny_model(tmp_path / "model", shard_size="200KB")
    index = directory / SAFETENSORS_INDEX
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[0]

    (directory / shard).rename(directory / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{shard}: missing, but"):
        TensorStore(directory)
    (directory / "elsewhere").rename(directory / shard)

    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"model.extra": shard}}))
    with pytest.raises(CheckpointError, match=r"lacks model\.extra"):
        TensorStore(directory)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        TensorStore(directory)
    index.write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        TensorStore(directory)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        TensorStore(directory)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="holds no tensor nothing"):
        TensorStore(directory).get("nothing")
