"""--processes N: the processes of one run, forked from this one when everything is imported.

torchrun imports torch to start processes that each import it again, seven seconds before a run of half a minute begins.
A process that was forked has what was imported before, and shares its memory. CUDA cannot be shared so: nothing before
the fork may ask for a GPU, and nothing does (tests/test_several.py).

The first process (rank 0) writes to the terminal as ever; what the others have to say on stderr, warnings and errors,
follows when all have ended, unless the first failed too, whose sentence is enough. If one fails the others are ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import tempfile
import time
from typing import IO

from marlin_gptq.cli import processes
from marlin_gptq.errors import InputError

# Seconds that the first process has to fail by itself, for the same reason as the one that did.
GRACE = 2.0
_PR_SET_PDEATHSIG = 1


def fork(count: int) -> int | None:
    """Go on as `count` processes. In each of them None; in this one, which works no more, the exit code of them all.

    InputError where torchrun or accelerate started processes already.
    """
    if count == 1:
        return None
    if "WORLD_SIZE" in os.environ:
        raise InputError(
            f"--processes: got {count} in a process that torchrun or accelerate started; leave one of the two out"
        )
    processes.note_age()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    port = _free_port()
    said = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115 (open until all have ended)
    parent, children = os.getpid(), {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _become(rank, count, port, said[rank], parent)
            return None
        children[child] = rank
    codes = _wait(children)
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)  # by us, because another failed, or all by somebody
    failed = [code for code in codes if code and code not in ended]
    if codes[0] == 0 or (codes[0] in ended and failed):
        for rank in range(1, count):
            said[rank].seek(0)
            os.write(2, said[rank].read())
    failed = failed or [code for code in codes if code]
    return (failed[0] if failed[0] > 0 else 128 - failed[0]) if failed else 0


def _become(rank: int, count: int, port: int, said: IO[bytes], parent: int) -> None:
    """One of the processes: with torchrun's environment, and ended when the first process of all dies."""
    import torch

    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in local.items()}, MASTER_ADDR="127.0.0.1")
    os.setpgid(0, 0)  # Ctrl-C comes from the first process, once, and not from the terminal as well
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(processes.threads_beside_gpu(1, cores, count))
    if rank:
        os.dup2(said.fileno(), 2)


def _wait(children: dict[int, int]) -> list[int]:
    """The exit codes by rank, negative for a signal; `children` are pid → rank. One that fails ends the others."""
    codes = [0] * len(children)

    def send(signum: int, _: object = None) -> None:
        for child in children:
            os.kill(child, signum)

    heard = [
        each for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN
    ]
    before = {each: signal.signal(each, send) for each in heard}  # what is ignored here (nohup) is ignored by all
    ends = [(GRACE, signal.SIGTERM), (5 * GRACE, signal.SIGKILL)]  # after the first failure
    failed = 0.0
    try:
        while children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child in children:
                rank = children.pop(child)
                codes[rank] = os.waitstatus_to_exitcode(status)
                failed = failed or (time.monotonic() if codes[rank] else 0.0)
            elif failed and ends and (time.monotonic() - failed > ends[0][0] or (codes[0] and len(ends) == 2)):
                send(ends.pop(0)[1])
            else:
                time.sleep(0.02)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return codes


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
