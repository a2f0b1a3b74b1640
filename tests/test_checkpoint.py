"""checkpoint.py: reading lazily, writing atomically, and a clear word for each broken file."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save_tiny_model
from safetensors.torch import save_file

from marlin_gptq import checkpoint
from marlin_gptq.checkpoint import CheckpointWriter, TensorStore, read_json, resolve_model
from marlin_gptq.errors import CheckpointError, InputError


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
    index = directory / checkpoint.SAFETENSORS_INDEX
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


def test_read_json_wants_an_object(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="got a JSON list, expected an object"):
        read_json(tmp_path / "config.json")


def write(output: Path, tensors: dict[str, torch.Tensor], *, shard_size: int = 10**9, overwrite: bool = False) -> None:
    with CheckpointWriter(output, shard_size=shard_size, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_text("config.json", "{}")
        writer.finish()


@pytest.mark.parametrize(("shard_size", "files"), [(10**9, 1), (500, 3), (1, 5)])
def test_writing_in_shards_reads_back(tmp_path: Path, shard_size: int, files: int) -> None:
    tensors = {f"t{i}": torch.full((50,), float(i)) for i in range(5)}
    write(tmp_path / "out", tensors, shard_size=shard_size)
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) == files
    store = TensorStore(tmp_path / "out")
    assert all(torch.equal(store.get(name), tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (tmp_path / "out").iterdir())


def test_writer_queues_a_copy(tmp_path: Path) -> None:
    tensor = torch.zeros(3)
    with CheckpointWriter(tmp_path / "out", shard_size=100, overwrite=False) as writer:
        writer.add("t", tensor)
        tensor.fill_(7)
        writer.finish()
    assert torch.equal(TensorStore(tmp_path / "out").get("t"), torch.zeros(3))


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", {"t": torch.zeros(2)})
    with pytest.raises(InputError, match="exists already; give another output or --overwrite"):
        write(tmp_path / "out", {"t": torch.ones(2)})
    for error in (RuntimeError, KeyboardInterrupt):
        with (
            pytest.raises(error),
            CheckpointWriter(tmp_path / "out", shard_size=1, overwrite=True) as writer,
        ):
            writer.add("t", torch.ones(2))
            writer.add("u", torch.ones(2))
            raise error
    assert torch.equal(TensorStore(tmp_path / "out").get("t"), torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(tmp_path / "out", {"t": torch.ones(2)}, overwrite=True)
    assert torch.equal(TensorStore(tmp_path / "out").get("t"), torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is not a directory"):
        CheckpointWriter(tmp_path / "file", shard_size=1, overwrite=True)
    with pytest.raises(InputError, match="cannot be created there"):
        CheckpointWriter(tmp_path / "file" / "out", shard_size=1, overwrite=False)


def test_full_disk_says_how_much_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"the disk is full: 4\.0 MB were to be written and .* MB are free"):
        write(tmp_path / "out", {"t": torch.zeros(1_000_000)})
    assert list(tmp_path.iterdir()) == []
    # In the thread, and told at the next opportunity: not only at the end.
    with (
        pytest.raises(CheckpointError, match=r"the disk is full: 0\.0 MB were to be written") as told,
        CheckpointWriter(tmp_path / "out", shard_size=8, overwrite=False) as writer,
    ):
        writer.add("a", torch.zeros(2))
        writer.add("b", torch.zeros(2))
        assert writer._writing is not None
        wait([writer._writing])
        writer.add("c", torch.zeros(2))
        raise AssertionError("the error came too late")
    assert isinstance(told.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_written_while_the_next_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, threads = threading.Event(), []

    def slow(*arguments: Any, **options: Any) -> None:
        threads.append(threading.current_thread().name)
        assert go_on.wait(30)
        save_file(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    tensors = {f"t{i}": torch.full((50,), float(i)) for i in range(5)}
    with CheckpointWriter(tmp_path / "out", shard_size=400, overwrite=False) as writer:
        for name in ("t0", "t1", "t2", "t3"):  # two shards: one is being written, one is full
            writer.add(name, tensors[name])
        threading.Timer(0.05, go_on.set).start()
        writer.add("t4", tensors["t4"])  # waits: there is no room for a third
        assert go_on.is_set()
        writer.finish()
    assert len(threads) == 3 and all(name.startswith("write-shard") for name in threads)
    assert not any(thread.name.startswith("write-shard") for thread in threading.enumerate())
    store = TensorStore(tmp_path / "out")
    assert all(torch.equal(store.get(name), tensor) for name, tensor in tensors.items())


def test_shards_are_on_the_disk_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = checkpoint._to_disk
    monkeypatch.setattr(checkpoint, "_to_disk", lambda path: (synced.append(path.name), real(path)))
    with CheckpointWriter(tmp_path / "out", shard_size=8, overwrite=False) as writer:
        writer.add("a", torch.zeros(2))
        writer.add("b", torch.zeros(2))
        writer.drain()
        assert synced == ["shard-0.safetensors", "shard-1.safetensors"]
        writer.drain()  # nothing waits: nothing happens
        assert len(synced) == 2
        writer.finish()


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_written_as_they_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "int": torch.randint(-(2**31), 2**31 - 1, (64, 96), dtype=torch.int32, generator=generator),
        "half": torch.randn(5, 7, generator=generator).half(),
        "larger": torch.randn(300, 200, generator=generator),
        "turned": torch.randn(30, 20, generator=generator).t(),
    }
    write(tmp_path / "cpu", tensors)
    write(tmp_path / "gpu", {name: tensor.cuda() for name, tensor in tensors.items()})
    one, other = (tmp_path / name / "model.safetensors" for name in ("cpu", "gpu"))
    assert one.read_bytes() == other.read_bytes()


def test_models_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    for name in ("/no/such/place", "./nowhere", "a/b/c", ""):
        with pytest.raises(InputError, match="no such directory; give a model directory or a hub id"):
            resolve_model(name)
    with pytest.raises(InputError, match="not in the local cache of the hub; run once without --offline"):
        resolve_model("nobody/nothing", offline=True)
    with pytest.raises(InputError, match="no such directory and no hub id"):
        resolve_model("a b/c", offline=True)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_hub_models_fetch_legacy_weights_only_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(model: str, **options: object) -> str:
        asked.append(options["allow_patterns"])
        assert (model, options["revision"], options["local_files_only"]) == ("owner/name", "v2", False)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("owner/name", revision="v2") == tmp_path
    assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True]
    asked.clear()
    save_file({"t": torch.zeros(1)}, tmp_path / "model.safetensors")
    resolve_model("owner/name", revision="v2")
    assert len(asked) == 1
