"""work_directory.py: damaged blocks, and disks that are full or refuse, cost time and no bit."""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import random_samples, save_tiny_model
from helpers_work_directory import BLOCKS, blocks_of, content_of, run

from marlin_gptq import CheckpointError, work_directory
from marlin_gptq.report import ProgressEvent


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=BLOCKS, attention_bias=True)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("expected") / "out"
    run(source, output, None)
    return content_of(output)


@pytest.mark.parametrize("harm", ["flip", "cut", "lose", "foreign"])
def test_damaged_blocks_are_noticed_and_done_again(
    source: Path, tmp_path: Path, expected: dict[str, Any], caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    run(source, tmp_path / "first", tmp_path / "whole-work")
    chance = random.Random(harm)
    for name in ("block-00000.safetensors", "block-00001.json", "block-00001.safetensors", "block-00002.json"):
        directory = tmp_path / f"work-{name}"
        shutil.copytree(tmp_path / "whole-work", directory)
        path = directory / name
        content = bytearray(path.read_bytes())
        if harm == "flip":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
        elif harm == "cut":
            path.write_bytes(content[: chance.randrange(len(content))])
        elif harm == "lose":
            path.unlink()
        else:
            shutil.copyfile(path.with_stem("block-00000" if "00000" not in name else "block-00001"), path)
        caplog.clear()
        events: list[ProgressEvent] = []
        with caplog.at_level(logging.WARNING):
            run(source, tmp_path / "out", directory, progress=events.append, overwrite=True)
        assert content_of(tmp_path / "out") == expected, name
        redone = {event.block for event in events if event.stage == "quantize"}
        assert redone == {int(name[6:11])}, "the blocks after it are as they were, and are not done again"
        if harm != "lose" or name.endswith(".safetensors"):
            assert "this step is done again" in caplog.text and name[:11] in caplog.text


def test_a_block_made_from_another_input_is_done_again(
    source: Path, tmp_path: Path, expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A valid block of a run with other samples, smuggled in, and so all checksums hold."""
    run(source, tmp_path / "other", tmp_path / "other-work", samples=random_samples(6, seed=9))
    run(source, tmp_path / "first", tmp_path / "work")
    for suffix in ("json", "safetensors"):
        shutil.copyfile(tmp_path / "other-work" / f"block-00001.{suffix}", tmp_path / "work" / f"block-00001.{suffix}")
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected
    assert "block-00001: was made from another input than the steps before it give now" in caplog.text


def test_a_full_disk_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Any]
) -> None:
    real, written = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal written
        written += 1
        if written == 7:  # samples, run.json, block 0, its record: two files each with their folder's sync
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(work_directory.os, "fsync", full)
    message = r"work: the disk is full: 0\.\d MB are needed, .* are free; make room and go on with --resume .*work"
    with pytest.raises(CheckpointError, match=message):
        run(source, tmp_path / "out", tmp_path / "work")
    assert len(blocks_of(tmp_path / "work")) == 0 and not list((tmp_path / "work").glob("*.writing"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]
    monkeypatch.setattr(work_directory.os, "fsync", real)
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected


@pytest.mark.parametrize("limit", [4_000, 60_000, 250_000])
def test_a_disk_that_really_refuses(source: Path, tmp_path: Path, expected: dict[str, Any], limit: int) -> None:
    """No file may grow beyond `limit`: the write fails in the operating system, at run.json, a block, or a shard."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 1
        try:
            run(source, tmp_path / "out", tmp_path / "work")
        except CheckpointError as error:
            code = 42 if "cannot be written" in str(error) else 43
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", tmp_path / "work")
    assert content_of(tmp_path / "out") == expected
