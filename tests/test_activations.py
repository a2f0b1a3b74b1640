"""modeling/activations.py: what waits between two blocks comes back as it was, wherever it waited."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from marlin_gptq import CheckpointError
from marlin_gptq.modeling import activations
from marlin_gptq.modeling.activations import Activations, digest_of, fingerprint

CPU = torch.device("cpu")
LENGTHS = [3, 1, 7, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_every_place_gives_back_what_was_put(tmp_path: Path, place: str, dtype: torch.dtype) -> None:
    store = Activations(
        [(1, length) for length in LENGTHS], 5, dtype, CPU, place=place, directory=tmp_path, tracked=True
    )
    tensors = [torch.randn(1, length, 5).to(dtype) for length in LENGTHS]
    for position in (2, 0, 3, 1):
        store.put(position, tensors[position])
    assert len(store) == 4 and all(map(torch.equal, store, tensors))
    assert store.digest() == digest_of(tensors)
    first, again = store[0], store[2]
    assert torch.equal(first, tensors[0]) and torch.equal(again, tensors[2]), "no read overwrites another"
    tensors[1] = tensors[1] * 2
    store.put(1, tensors[1])
    assert all(map(torch.equal, store, tensors)) and store.digest() == digest_of(tensors)
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_a_disk_too_small_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(activations.os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"the disk is full: activations need 0\.1 MB and .* are free; make room"):
        Activations([(1, 1000)], 25, torch.float32, CPU, place="disk", directory=tmp_path)
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        Activations([(1, 1)], 1, torch.float32, CPU, place="disk", directory=tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_a_fingerprint_is_the_sum_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow twin, one value at a time, and in pieces."""
    tensor = torch.randn(1, 13, 3)
    total = sum((2 * i + 1) * int(bits) for i, bits in enumerate(tensor.view(torch.int32).flatten()))
    expected = f"torch.float32 [1, 13, 3] {total % 2**64:016x}"
    assert fingerprint(tensor) == expected
    monkeypatch.setattr(activations, "_CHUNK", 7)
    assert fingerprint(tensor) == expected


def test_a_fingerprint_sees_values_order_shape_and_type() -> None:
    tensor = torch.randn(2, 8)
    seen = {fingerprint(tensor)}
    for row in range(2):
        for column in range(8):
            for bit in range(32):
                changed = tensor.clone()
                changed.view(torch.int32)[row, column] ^= 1 << bit if bit < 31 else -(1 << 31)
                seen.add(fingerprint(changed))
    assert len(seen) == 1 + 2 * 8 * 32
    others = (tensor.flip(0), tensor.reshape(4, 4), tensor.half(), tensor.half().bfloat16(), tensor.t())
    assert len({fingerprint(other) for other in others} | seen) == len(seen) + len(others)
