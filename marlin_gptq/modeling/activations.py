"""The calibration activations between two blocks: on the device, in host memory or in a file.

All samples pass block after block, so what waits between two blocks is tokens × hidden_size values: 2 GB for 256,000
tokens of a 7B model, 4 GB for as many of a 70B.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.errors import CheckpointError

PLACES = ("device", "host", "disk")
_CHUNK = 1 << 20


class Activations:
    """One tensor [B, T, width] per sample, each of its own B and T, written and read by position.

    shapes     (B, T) of each sample; B is 1 for documents, more for batches of windows.
    place      "device" as it is; "host" in page-locked memory if the device is a GPU (pageable copies crawl); "disk" in
               a file under `directory` that has no name, so that not even a killed process leaves it behind.
    tracked    keep a fingerprint of every tensor written, see `digest`.

    Raises CheckpointError if the disk does not hold them.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        place: str = "device",
        directory: Path | None = None,
        tracked: bool = False,
    ) -> None:
        assert place in PLACES, place
        self.shapes, self.width, self.dtype, self.device = shapes, width, dtype, device
        self.place = place
        self.tracked = tracked
        self._held: list[Tensor | None] = [None] * len(shapes)
        self._prints = [""] * len(shapes)
        self._file = None
        if place == "disk":
            self._file = _nameless_file(directory or Path(tempfile.gettempdir()), self._offset(len(shapes)))
            self._buffer = torch.empty(
                max((prod(shape) for shape in shapes), default=0) * width, dtype=dtype, pin_memory=device.type == "cuda"
            ).view(torch.uint8)

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Tensor:
        """The tensor on the device."""
        if self._file is not None:
            start, stop = self._offset(position), self._offset(position + 1)
            piece = self._buffer[: stop - start]
            _read(self._file.fileno(), piece, start)
            return piece.view(self.dtype).reshape(*self.shapes[position], self.width).to(self.device, copy=True)
        held = self._held[position]
        assert held is not None, f"sample {position} was not written yet"
        return held.to(self.device, non_blocking=True)

    def row(self, position: int, row: int) -> Tensor:
        """One row of the tensor at `position`, [1, T, width] on the device."""
        held = self._held[position]
        if held is None:  # in a file
            return self[position][row : row + 1]
        return held[row : row + 1].to(self.device, non_blocking=True)

    def put(self, position: int, hidden: Tensor) -> None:
        """Write, or write anew, the tensor at `position`."""
        if self.tracked:
            self._prints[position] = fingerprint(hidden)
        if self._file is not None:
            piece = self._buffer[: hidden.numel() * hidden.element_size()]
            piece.view(self.dtype).copy_(hidden.reshape(-1))
            _write(self._file.fileno(), piece, self._offset(position))
        elif self.place == "host" and self.device.type == "cuda":
            kept = self._held[position]
            if kept is None:
                kept = self._held[position] = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            kept.copy_(hidden)
        else:
            self._held[position] = hidden

    def joined(self, pack: range) -> Tensor:
        """The tensors at these positions one behind the other, [1, ΣT, width]; of one position the tensor itself."""
        tensors = [self[position] for position in pack]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)

    def put_joined(self, pack: range, hidden: Tensor) -> None:
        """`put` for each of these positions, from what `joined` would give."""
        lengths = [self.shapes[position][1] for position in pack]
        for position, part in zip(pack, hidden.split(lengths, dim=1), strict=True):
            self.put(position, part)

    def digest(self) -> str:
        """SHA-256 of all fingerprints: equal if and, but for deliberate collisions, only if all tensors are."""
        assert self.tracked
        return hashlib.sha256("\n".join(self._prints).encode()).hexdigest()

    def _offset(self, position: int) -> int:
        return sum(map(prod, self.shapes[:position])) * self.width * self.dtype.itemsize


def fingerprint(tensor: Tensor) -> str:
    """Shape, dtype and Σ (2i + 1)·bits_i mod 2⁶⁴, with bits_i the i-th value read as an integer: exact on every device.

    Weights are odd, so that no change of a single value goes unseen.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    values = tensor.detach().contiguous().view(integers).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].to(torch.int64)
        weights = torch.arange(start, start + len(chunk), device=tensor.device).mul_(2).add_(1)
        total += (chunk * weights).sum()
    return f"{tensor.dtype} {list(tensor.shape)} {int(total) & (2**64 - 1):016x}"


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the fingerprints of these tensors, in order."""
    return hashlib.sha256("\n".join(map(fingerprint, tensors)).encode()).hexdigest()


def _nameless_file(directory: Path, size: int) -> Any:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (open as long as its owner lives)
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(directory).free
            reason = f"the disk is full: activations need {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free"
        raise CheckpointError(f"{directory}: {reason}; make room, or spill to another place") from error
    return file


def _read(handle: int, piece: Tensor, offset: int) -> None:
    view = memoryview(piece.numpy().data)
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise CheckpointError("activations: their temporary file is shorter than it was made")
        view, offset = view[count:], offset + count


def _write(handle: int, piece: Tensor, offset: int) -> None:
    view = memoryview(piece.numpy().data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
