"""--processes N: forked processes that do what torchrun's do, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from character_model import save_character_model, save_texts
from click.testing import CliRunner
from helpers import save_tiny_model

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.cli.quantize import main

WORKER = """
import os, signal, sys, time
from pathlib import Path
from marlin_gptq.cli import several
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may have been started where it is ignored
folder = Path(sys.argv[1])
for what in sys.argv[2:]:  # one after the other: to import everything takes longest
    code = several.fork(3)
    if code is None:
        break
    print(what, "ended with", code, flush=True)
else:
    sys.exit(code)
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "3" and int(os.environ["LOCAL_RANK"]) == rank
(folder / f"{rank}").write_text(str(os.getpid()))
print(f"{rank} says {what}", file=sys.stderr, flush=True)
if what == "well":
    sys.exit(0)
if what == "no" or (what == "failed" and rank == 2):
    sys.exit(7)
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(300)
"""


def begin(folder: Path, *what: str) -> subprocess.Popen[str]:
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, str(folder / "worker.py"), str(folder), *what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(folder: Path) -> list[int]:
    """Of the three, once all are there and know their part."""
    files = [folder / str(rank) for rank in range(3)]
    for _ in range(600):
        if all(file.exists() and file.read_text() for file in files):
            return [int(file.read_text()) for file in files]
        time.sleep(0.1)
    raise AssertionError("they did not begin")


def test_they_end_together(tmp_path: Path) -> None:
    wanted = {
        "well": (0, [0, 1, 2]),  # warnings of the others come in the end
        "no": (7, [0]),  # all fail for one reason: it is said once
        "failed": (7, [0, 1, 2]),
        "killed": (137, [0, 1, 2]),
    }
    process = begin(tmp_path, *wanted)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 137, errors
    for what, (code, heard) in wanted.items():
        assert f"{what} ended with {code}\n" in output, output + errors
        assert [rank for rank in range(3) if f"{rank} says {what}\n" in errors] == heard, errors
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize(("sent", "codes"), [(signal.SIGINT, (1, 130)), (signal.SIGKILL, (-9,))])
def test_who_ends_the_first_ends_all(tmp_path: Path, sent: int, codes: tuple[int, ...]) -> None:
    """Even by SIGKILL, which it cannot tell the others of."""
    process = begin(tmp_path, "wait")
    try:
        own = pids(tmp_path)
        process.send_signal(sent)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode in codes
    for _ in range(100):
        if not any(map(alive, own)):
            return
        time.sleep(0.1)
    raise AssertionError("some are still there")


def test_nothing_asks_for_a_gpu_before_the_fork() -> None:
    """CUDA cannot be used in a process that was forked from one that used it."""
    asks = "is_available device_count init _lazy_init current_device get_device_capability"
    code = f"""
import torch
def asked(*_, **__):
    raise SystemExit("a GPU was asked for while modules were imported")
for name in "{asks}".split():
    setattr(torch.cuda, name, asked)
import marlin_gptq.cli.quantize
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_way_to_start_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = save_tiny_model(tmp_path / "source")
    done = CliRunner().invoke(main, [str(source), "-o", str(tmp_path / "out"), "--processes", "2"])
    assert done.exit_code == 2
    assert "error: --processes: got 2 in a process that torchrun or accelerate started; leave one" in done.stderr


@pytest.mark.slow
def test_ended_by_a_signal_they_clean_up(tmp_path: Path) -> None:
    save_texts(texts := tmp_path / "texts.jsonl")
    source = save_character_model(tmp_path / "source", num_hidden_layers=16)
    arguments = [source, "--dataset", texts, "--n-samples", 5, "--preset", "marlin", "--device", "cpu"]
    command = [sys.executable, "-m", "marlin_gptq.cli.quantize", *arguments, "-o", tmp_path / "deep" / "out"]
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            [*map(str, command), "--processes", "2"], stderr=subprocess.PIPE, text=True, preexec_fn=os.setsid
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("["):
                break
        process.send_signal(sent)
        errors = process.stderr.read()  # until all of them have ended
        assert process.wait(60) == code
        assert errors.count("error: interrupted: nothing was written under") == 1, errors
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "texts.jsonl"]


@pytest.mark.slow
def test_the_command_does_what_it_does_under_torchrun(tmp_path: Path) -> None:
    source = save_character_model(tmp_path / "source")
    save_texts(texts := tmp_path / "texts.jsonl")
    arguments = ["-m", "marlin_gptq.cli.quantize", source, "--dataset", texts, "--n-samples", 5, "--no-clip"]
    arguments += ["--preset", "marlin", "--device", "cpu"]
    threads = {"OMP_NUM_THREADS": str(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    for start, output, more in (([], "forked", ["--processes", 2]), (torchrun, "started", [])):
        command = [sys.executable, *start, *arguments, "-o", tmp_path / output, *more]
        done = subprocess.run(
            list(map(str, command)), env=os.environ | threads, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("reading calibration text") == 1, "one process tells"
    one, other = (TensorStore(tmp_path / name) for name in ("forked", "started"))
    assert one.names == other.names
    assert all((one.get(name) == other.get(name)).all() for name in one.names)
