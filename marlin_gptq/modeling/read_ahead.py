"""Tensors read from a checkpoint before they are asked for, by a thread, while the device is busy with others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from marlin_gptq.checkpoint import TensorStore

logger = logging.getLogger(__name__)
# A tensor of the files, and the part of it that is wanted (None is all): an expert and its rows, or an expert and its
# columns where files hold its matrix turned.
Source = tuple[str, tuple[int, slice] | tuple[int, slice, slice] | None]


def read(store: TensorStore, source: Source) -> Tensor:
    """The tensor, or its part, as stored, on the CPU. CheckpointError as `TensorStore.get`."""
    name, part = source
    if part is None:
        return store.get(name)
    found = store.get_part(name, part)
    return found.t() if len(part) == 3 else found


class ReadAhead:
    """Reads into host memory, page-locked for a GPU: from there it comes to the device at the full speed of the bus.

    What waits takes memory until it is taken, so ask for one block at a time. The device's own memory is not touched:
    the copy to it takes a hundredth of the time that a block computes, and the memory may be all in use.
    """

    def __init__(self, store: TensorStore, device: torch.device) -> None:
        self._store = store
        self._pinned = device.type == "cuda"
        self._gpu = device.index
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead", initializer=self._begin)
        self._waiting: dict[str, Future[Tensor]] = {}

    def start(self, sources: Mapping[str, Source]) -> None:
        """Begin to read these, in this order; names are those that `take` goes by."""
        if self._pinned and self._gpu is None:
            self._gpu = torch.cuda.current_device()
        for name, source in sources.items():
            if name not in self._waiting:
                self._waiting[name] = self._thread.submit(self._read, source)

    def take(self, name: str) -> Tensor | None:
        """The tensor, waited for, or what reading it raised; None if it was not asked for."""
        waiting = self._waiting.pop(name, None)
        return None if waiting is None else waiting.result()

    def close(self) -> None:
        """Drop what was not read yet, and end the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._waiting.clear()

    def _begin(self) -> None:
        if self._pinned and self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # each thread has its own; page-locking wants a context on that GPU

    def _read(self, source: Source) -> Tensor:
        stored = read(self._store, source)  # a view of the mapped file: only the copy reads it
        return self._empty_like(stored).copy_(stored)

    def _empty_like(self, tensor: Tensor) -> Tensor:
        if self._pinned:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                logger.warning("no memory could be page-locked (%s): weights are loaded more slowly", error)
                self._pinned = False
        return torch.empty(tensor.shape, dtype=tensor.dtype)
