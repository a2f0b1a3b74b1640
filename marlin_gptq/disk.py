"""Disks: whether there is room, and what is written brought safely onto them."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from marlin_gptq.errors import CheckpointError


def require_space(output: Path, size: int) -> None:
    """CheckpointError, before any work, if `size` bytes do not fit on the disk of `output`."""
    free = shutil.disk_usage(standing(output)).free
    if free < size:
        raise CheckpointError(
            f"{output}: the disk is full: {size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free; make room "
            "or choose another output"
        )


def standing(path: Path) -> Path:
    """Where `path` leads, or the nearest directory above that there is: what lies there is on the same disk."""
    path = Path(os.path.realpath(path))
    while not path.exists():
        path = path.parent
    return path


def make_directories(path: Path) -> list[Path]:
    """Make a directory and what is missing above it; those that were made, the innermost first."""
    made = []
    for directory in reversed([path, *path.parents]):
        if not directory.exists():
            with suppress(FileExistsError):  # another process was quicker
                directory.mkdir()
                made.append(directory)
    return made[::-1]


def to_disk(path: Path) -> None:
    """A file's bytes, or a directory's names, survive a power failure from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
