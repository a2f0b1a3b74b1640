"""Disks: whether there is room, a temporary place beside a result, and what is written brought safely onto them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marlin_gptq.errors import CheckpointError, InputError


def require_space(output: Path, size: int) -> None:
    """CheckpointError, before any work, if `size` bytes do not fit on the disk of `output`."""
    free = shutil.disk_usage(standing(output)).free
    if free < size:
        raise CheckpointError(
            f"{output}: the disk is full: {size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free; make room "
            "or choose another output"
        )


def standing(path: Path) -> Path:
    """`path`, or the nearest directory above it that there is: what lies there is on the same disk."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def staging_directory(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `output`, on the same disk, for a result that is not the last; gone afterwards."""
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; give another output or --overwrite")
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.absolute().parent))
    except OSError as error:
        raise InputError(f"{output}: cannot be created there ({error.strerror})") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def to_disk(path: Path) -> None:
    """A file's bytes, or a directory's names, survive a power failure from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
