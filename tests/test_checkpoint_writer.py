"""checkpoint_writer.py: written in shards by a thread, and as a whole or not at all."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from marlin_gptq import checkpoint_writer
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.checkpoint_writer import CheckpointWriter
from marlin_gptq.errors import CheckpointError, InputError


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
    with pytest.raises(InputError, match="exists already; give another --output, or --overwrite"):
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
    with pytest.raises(InputError, match="is a file; give a directory as --output"):
        CheckpointWriter(tmp_path / "file", shard_size=1, overwrite=True)
    with pytest.raises(InputError, match=r"cannot be made, .*file is a file"):
        CheckpointWriter(tmp_path / "file" / "out", shard_size=1, overwrite=False)


def test_full_disk_says_how_much_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "save_file", full)
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

    monkeypatch.setattr(checkpoint_writer, "save_file", slow)
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
    real = checkpoint_writer.to_disk
    monkeypatch.setattr(checkpoint_writer, "to_disk", lambda path: (synced.append(path.name), real(path)))
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


def test_folders_of_companions_are_copied_with_the_rights_of_any_new_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    (source / "config.json").write_text("{}")
    with CheckpointWriter(tmp_path / "out", shard_size=8, overwrite=False) as writer:
        writer.add("a", torch.zeros(1))
        writer.copy_companions(source, leave=("config.json",))
        writer.finish()
    copied = tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja"
    assert copied.read_text() == "T" and not (tmp_path / "out" / "config.json").exists()
    assert copied.parent.stat().st_mode == (tmp_path / "out").stat().st_mode
