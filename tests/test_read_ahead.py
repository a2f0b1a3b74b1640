"""read_ahead.py: tensors read by a thread are those read when they are needed, and so are the errors."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from character_model import save_character_model
from click.testing import CliRunner
from helpers import save_tiny_model
from torch import Tensor

from marlin_gptq import CheckpointError
from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.cli.quantize import main
from marlin_gptq.modeling.blocks import BlockStream
from marlin_gptq.modeling.read_ahead import ReadAhead

CPU = torch.device("cpu")


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def weights(stream: BlockStream, index: int) -> dict[str, Tensor]:
    with stream.block(index) as block:
        return {name: tensor.clone() for name, tensor in block.state_dict().items()}


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_blocks_read_ahead_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, stored: torch.dtype
) -> None:
    source = save_tiny_model(tmp_path / "source", architecture, dtype=stored, shard_size="200KB")
    expected = [weights(BlockStream(source, device=CPU), index) for index in range(2)]
    readers: list[str] = []
    get = TensorStore.get

    def noted(self: TensorStore, name: str) -> Tensor:
        readers.append(threading.current_thread().name)
        return get(self, name)

    monkeypatch.setattr(TensorStore, "get", noted)
    stream = BlockStream(source, device=CPU)
    for index in (0, 1, 0):  # the last one twice: asked for again, read again
        stream.read_ahead(index)
        stream.read_ahead(index)
        found = weights(stream, index)
        assert found.keys() == expected[index].keys()
        assert all(torch.equal(found[name], expected[index][name]) for name in found)
    assert len(readers) == 3 * len(expected[0]) and all(name.startswith("read-ahead") for name in readers)
    stream.close()
    assert not reading_threads()


def test_a_block_that_was_not_asked_for_is_read_when_it_is_entered(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    expected = weights(BlockStream(source, device=CPU), 1)
    stream = BlockStream(source, device=CPU)
    stream.read_ahead(0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(stream, 1).items())
    stream.close()
    assert not reading_threads()


def test_errors_are_those_of_reading_at_once(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    sentences = []
    for ahead in (False, True):
        stream = BlockStream(source, device=CPU)
        content = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(content[: len(content) // 2])
        if ahead:
            stream.read_ahead(1)
        with pytest.raises(CheckpointError) as told, stream.block(1):
            pass
        sentences.append(str(told.value))
        stream.close()
        (source / "model.safetensors").write_bytes(content)
    assert "truncated or corrupt" in sentences[0] and sentences[0] == sentences[1]
    assert not reading_threads()


def test_an_error_of_the_thread_ends_the_command_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = TensorStore.get

    def broken(self: TensorStore, name: str) -> Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            assert threading.current_thread().name.startswith("read-ahead")
            raise CheckpointError(f"{self.directory}: truncated or corrupt (a test); fetch or copy it again")
        return get(self, name)

    source = save_character_model(tmp_path / "source")
    monkeypatch.setattr(TensorStore, "get", broken)
    result = CliRunner().invoke(main, [str(source), "-o", str(tmp_path / "out"), "--method", "rtn"])
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().split("\n")[-1] == (
        f"error: {source}: truncated or corrupt (a test); fetch or copy it again"
    )
    assert "block 1/" in result.stderr and "block 2/" not in result.stderr  # raised for the block it belongs to
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and not reading_threads()


def test_closing_waits_for_one_tensor_and_drops_the_others(tmp_path: Path) -> None:
    begun, go_on, read = threading.Event(), threading.Event(), []

    class Slow(TensorStore):
        def get(self, name: str) -> Tensor:
            read.append(name)
            begun.set()
            assert go_on.wait(30)
            return super().get(name)

    store = Slow(save_tiny_model(tmp_path / "source"))
    ahead = ReadAhead(store, CPU)
    ahead.start({name: (name, None) for name in store.names})
    assert begun.wait(30)
    threading.Timer(0.05, go_on.set).start()
    ahead.close()
    assert read == store.names[:1] and not reading_threads()
    ahead.close()  # twice does no harm


def test_memory_that_cannot_be_locked_is_said_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = TensorStore(save_tiny_model(tmp_path / "source"))
    devices: list[int] = []
    empty = torch.empty

    def no_locking(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", no_locking)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    ahead = ReadAhead(store, torch.device("cuda", 1))
    names = store.names[:3]
    with caplog.at_level(logging.WARNING):
        ahead.start({name: (name, None) for name in names})
        for name in names:
            found = ahead.take(name)
            assert found is not None and torch.equal(found, store.get(name))
    ahead.close()
    assert devices == [1] and caplog.text.count("no memory could be page-locked") == 1
    assert ahead.take("never asked for") is None


@pytest.mark.gpu
def test_blocks_read_ahead_for_a_gpu_are_the_same(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", num_hidden_layers=4)
    gpu = torch.device("cuda")
    stream, plain = BlockStream(source, device=gpu), BlockStream(source, device=gpu)
    stream.read_ahead(0)
    for index in range(4):
        with stream.block(index) as block, plain.block(index) as other:
            if index < 3:
                stream.read_ahead(index + 1)  # page-locked memory of this block is used again
            expected = other.state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in block.state_dict().items())
            assert all(tensor.is_cuda for tensor in block.state_dict().values())
    stream.close()
