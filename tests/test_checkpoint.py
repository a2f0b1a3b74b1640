"""checkpoint.py: reading lazily, and a clear word for each broken file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign import change_config
from helpers import save_tiny_model
from safetensors.torch import save_file

from marlin_gptq.checkpoint import CheckpointWarning, TensorStore
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

    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # before torch 1.6
    assert torch.equal(TensorStore(tmp_path).get("b"), tensors["b"])

    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    for zipped in (True, False):
        torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
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


def test_the_file_that_transformers_would_load_is_read(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model", shard_size="200KB")
    name = "model.norm.weight"
    shards = TensorStore(directory).get(name)
    save_file({name: shards + 1}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(CheckpointWarning, match=r"holds model\.safetensors and model\.safetensors\.index\.json"):
        assert torch.equal(TensorStore(directory).get(name), shards + 1)
    torch.save({name: shards + 2}, directory / "pytorch_model.bin")
    change_config(directory, transformers_weights=SAFETENSORS_INDEX)
    assert torch.equal(TensorStore(directory).get(name), shards)
    change_config(directory, transformers_weights="../other.safetensors")
    with pytest.raises(CheckpointError, match="outside its directory"):
        TensorStore(directory)
    change_config(directory, transformers_weights="gone.safetensors")
    with pytest.raises(CheckpointError, match=r"transformers_weights: got 'gone\.safetensors', which is no file"):
        TensorStore(directory)
    change_config(directory, transformers_weights=None)
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    assert torch.equal(TensorStore(directory).get(name), shards + 2)


def test_an_index_of_the_single_file_is_no_second_checkpoint(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / SAFETENSORS_INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert TensorStore(tmp_path).names == ["a"]
    assert not recwarn.list


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.bin", "llama-7b-4bit.pt", "gptq_model-4bit-128g.safetensors"])
def test_the_only_file_of_weights_may_have_any_name(tmp_path: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    else:
        torch.save({"a": torch.ones(1)}, tmp_path / name, _use_new_zipfile_serialization=False)
    for other in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"b": torch.ones(1)}, tmp_path / other)
    torch.save([1], tmp_path / "training_args.bin")
    assert TensorStore(tmp_path).names == ["a"]
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"index of them; adapter_model\.safetensors, consolidated\.safetensors,"):
        TensorStore(tmp_path)
    for shard in (1, 2):
        save_file({"a": torch.ones(1)}, tmp_path / f"model-0000{shard}-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors, model-00002-of-00002\.safetensors "):
        TensorStore(tmp_path)
