"""work_directory.py: a run killed at any moment gives the same bits in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import save_tiny_model
from helpers_work_directory import BLOCKS, Killed, blocks_of, content_of, run

from marlin_gptq import placement, work_directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=BLOCKS, attention_bias=True)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("expected") / "out"
    run(source, output, None)
    return content_of(output)


@pytest.mark.parametrize("system_call", ["fsync", "replace"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_any_write(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, Any],
    system_call: str,
    before: bool,
) -> None:
    """The process ends at the first write of one attempt, a later one of the next, …: no attempt loses a block."""
    real = getattr(os, system_call)
    remaining = 0

    def fatal(*arguments: Any) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0 and before:
            raise Killed
        real(*arguments)
        if remaining == 0:
            raise Killed

    monkeypatch.setattr(work_directory.os, system_call, fatal)
    attempts, done = 0, 0
    for moment in (1, 1, 2, 3, 4, 2, 5, 3, 6, 10**9):
        remaining = moment
        attempts += 1
        try:
            run(source, tmp_path / "out", tmp_path / "work")
            break
        except Killed:
            assert not (tmp_path / "out").exists()
            assert len(blocks_of(tmp_path / "work")) >= done
            done = len(blocks_of(tmp_path / "work"))
    assert attempts > 3 and content_of(tmp_path / "out") == expected


def test_killed_before_the_replaced_directory_is_gone(source: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    save_tiny_model(tmp_path / "out", seed=5)
    child = os.fork()
    if child == 0:
        placement.shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        run(source, tmp_path / "out", tmp_path / "work", overwrite=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(tmp_path.glob(".out.partial-*/old/model.safetensors"))) == 1
    run(source, tmp_path / "out", tmp_path / "work", overwrite=True)
    assert content_of(tmp_path / "out") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out", "work"}


KILLED_RUNS = """
# Forks a child that quantizes, kills it at a random moment, and so on until one gets through.
# Arguments: source, folder, seed, folder of the tests, number of kills.
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import torch
torch.set_num_threads(1)
import helpers_work_directory as t
source, folder, random_moment = Path(sys.argv[1]), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
started = time.monotonic()
t.run(source, folder / "whole", folder / "whole-work")  # warms up, and says how long a run takes
length = time.monotonic() - started
kills, finished = 0, 0
status = -1
while kills < int(sys.argv[5]) or status != 0:
    child = os.fork()
    if child == 0:
        t.run(source, folder / "out", folder / "work", overwrite=True)
        os._exit(0)
    if kills < int(sys.argv[5]):
        time.sleep(random_moment.uniform(0, 0.7 * length))
        os.kill(child, signal.SIGKILL)
        kills += 1
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    if status == 0:
        finished += 1
        assert t.content_of(folder / "out") == t.content_of(folder / "whole")
        if kills < int(sys.argv[5]):  # once more, over what is there
            import shutil
            shutil.rmtree(folder / "work")
print(kills, finished)
"""


def kill_often(source: Path, folder: Path, seed: int, kills: int) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED_RUNS, source, folder, seed, here, kills]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) == kills and int(done.stdout.split()[-1]) >= 1
    left = {path.name for path in folder.iterdir()}
    assert left == {"whole", "whole-work", "out", "work"}, "killed runs leave nothing beside the output"


def test_killed_at_random_moments(source: Path, tmp_path: Path) -> None:
    kill_often(source, tmp_path, seed=1, kills=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_many_random_moments(source: Path, tmp_path: Path, seed: int) -> None:
    kill_often(source, tmp_path, seed=seed, kills=60)
