"""Several processes started by torchrun, accelerate or --processes: who this one is, from environment variables."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from marlin_gptq.distributed import Team
from marlin_gptq.errors import InputError

if TYPE_CHECKING:
    import torch


@contextmanager
def team(device: str) -> Iterator[Team]:
    """The processes that were started with this one, or a team of one; `device` decides between nccl and gloo."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    import torch
    import torch.distributed as dist

    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if cuda:
        torch.cuda.set_device(_local_rank())
        cores, here = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(threads_beside_gpu(torch.get_num_threads(), cores, here))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process: that of its number on its machine. InputError if there are fewer."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    import torch

    return torch.device("cuda", _local_rank())


def threads_beside_gpu(given: int, cores: int, processes: int) -> int:
    """Threads for what the host does in one of `processes` that share `cores`, each of them with a GPU.

    torchrun gives every process a single one, unless told otherwise; with it the checks and copies of a large table
    keep the GPUs waiting. No result depends on the number where a GPU computes.
    """
    return given if given > 1 else max(1, min(8, cores // processes))


def threads_as_leader(team: Team) -> None:
    """On a CPU, sums depend on the number of threads by a bit: all processes use as many as the first."""
    import torch

    threads = team.from_leader(torch.get_num_threads())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


# Seconds that the process which this one was forked from had lived until then.
_age_at_fork = 0.0


def note_age() -> None:
    """To be called before a fork: what was imported until then counts for the processes that come of it."""
    global _age_at_fork
    _age_at_fork = age()


def age() -> float:
    """Seconds since this process began, importing everything included; 0 where the system does not tell."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): since the machine started
        return _age_at_fork + max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _local_rank() -> int:
    import torch

    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= gpus:
        raise InputError(
            f"--processes (or --nproc-per-node): process {rank + 1} found {gpus} GPUs; start as many as there are"
        )
    return rank
