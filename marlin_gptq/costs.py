"""What each stage of a run costs: seconds, and the most memory the GPU held meanwhile."""

from __future__ import annotations

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
            cost = self.by_name.setdefault(name, Cost(seconds=0.0, peak_gpu_bytes=None))
            cost["seconds"] += time.perf_counter() - started
            if peak is not None:
                cost["peak_gpu_bytes"] = max(peak, cost["peak_gpu_bytes"] or 0)

    def rest(self, name: str, since: float) -> float:
        """Adds to `name` what has passed since `time.perf_counter()` was `since` and was not measured.

        So all stages together are the time since then, which is returned, if all were measured since then.
        """
        self._look()
        passed = time.perf_counter() - since
        left = passed - sum(cost["seconds"] for cost in self.by_name.values())
        cost = self.by_name.setdefault(name, Cost(seconds=0.0, peak_gpu_bytes=None))
        cost["seconds"] += max(0.0, left)
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
