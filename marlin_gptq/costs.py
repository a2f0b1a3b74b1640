"""What each stage of a run costs: seconds, and the most memory the GPU held meanwhile."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch


class Cost(TypedDict):
    """Summed seconds of one stage and its peak of allocated GPU bytes (None without a GPU)."""

    seconds: float
    peak_gpu_bytes: int | None


class Costs:
    """Measured by name. A GPU works behind the calls that ask it to, so it is waited for at both ends of a stage: its
    time counts where the work was asked for. Threads that read ahead and write behind count only where they are
    waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_name: dict[str, Cost] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._peak = 0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time inside to `name`. Not to be nested."""
        self._look()
        started = time.perf_counter()
        try:
            yield
        finally:
            peak = self._look()
            self._add(name, Cost(seconds=time.perf_counter() - started, peak_gpu_bytes=peak))

    @contextmanager
    def streams(self, count: int) -> Iterator[list[StreamCosts]]:
        """So many CUDA streams to work on side by side, each with costs of its own; not to be nested, as `measure`.

        What this process's current stream was given before is done before them, and what it is given afterwards after
        them. The time inside is shared out among the stages measured on them, in proportion to their own time.
        """
        self._look()
        started = time.perf_counter()
        current = torch.cuda.current_stream(self.device)
        made = [StreamCosts(self.device, number) for number in range(count)]
        for one in made:
            one.stream.wait_stream(current)
        try:
            yield made
        finally:
            for one in made:
                current.wait_stream(one.stream)
            peak = self._look()
            seconds = time.perf_counter() - started
            total = sum(one.total() for one in made)
            for one in made:
                one.seconds = seconds * one.total() / total if total else 0.0
                for name, own in one.by_name.items():
                    share = Cost(seconds=seconds * own["seconds"] / total, peak_gpu_bytes=peak)
                    self._add(name, share)

    def _add(self, name: str, more: Cost) -> None:
        cost = self.by_name.setdefault(name, Cost(seconds=0.0, peak_gpu_bytes=None))
        cost["seconds"] += more["seconds"]
        if more["peak_gpu_bytes"] is not None:
            cost["peak_gpu_bytes"] = max(more["peak_gpu_bytes"], cost["peak_gpu_bytes"] or 0)

    def rest(self, name: str, since: float) -> float:
        """Adds to `name` what has passed since `time.perf_counter()` was `since` and was not measured.

        So all stages together are the time since then, which is returned, if all were measured since then.
        """
        peak = self._look()
        passed = time.perf_counter() - since
        left = passed - sum(cost["seconds"] for cost in self.by_name.values())
        self._add(name, Cost(seconds=max(0.0, left), peak_gpu_bytes=peak))
        return passed

    def peak_gpu_bytes(self) -> int | None:
        """Most allocated bytes since this object was made; None without a GPU."""
        self._look()
        return self._peak if self.device.type == "cuda" else None

    def _look(self) -> int | None:
        """The peak since the last look."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, peak)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class StreamCosts(Costs):
    """Of work on one of several CUDA streams: measured by events on it, which wait for nothing.

    seconds  the share of the time of all of them that fell to this one, once `Costs.streams` is left.
    """

    def __init__(self, device: torch.device, number: int) -> None:
        self.device = device
        self.stream = _stream(torch.cuda.current_device() if device.index is None else device.index, number)
        self.seconds = 0.0
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """As `Costs.measure`, of what the stream is given inside."""
        events = name, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[1].record(self.stream)
        try:
            yield
        finally:
            events[2].record(self.stream)
            self._events.append(events)

    @property
    def by_name(self) -> dict[str, Cost]:  # type: ignore[override]
        """Seconds of the stages, once the stream is done."""
        found: dict[str, Cost] = {}
        for name, before, behind in self._events:
            cost = found.setdefault(name, Cost(seconds=0.0, peak_gpu_bytes=None))
            cost["seconds"] += before.elapsed_time(behind) / 1000
        return found

    def total(self) -> float:
        """Seconds of all stages together."""
        return sum(cost["seconds"] for cost in self.by_name.values())


@functools.cache
def _stream(device: int, number: int) -> torch.cuda.Stream:
    """The same ones every time: cuBLAS keeps 32 MiB of scratch for each stream that it has ever worked on."""
    return torch.cuda.Stream(device)
