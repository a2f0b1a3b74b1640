"""Files that are there whole or not at all, and JSON that shows when it was damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from marlin_gptq.disk import to_disk
from marlin_gptq.errors import CheckpointError

# Ends the name of a file that is not whole yet; one that a killed process left may be removed.
WRITING = ".writing"


def write_whole(path: Path, content: bytes) -> None:
    """Written under another name, synced, renamed: the old file or the new one, never a part, after an error too."""
    writing = path.with_name(f"{path.name}{WRITING}")
    try:
        with open(writing, "wb", buffering=0) as file:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(writing, path)
        to_disk(path.parent)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise


def sealed(content: dict[str, Any]) -> bytes:
    """A JSON object with its own checksum in it."""
    return (json.dumps(content | {"sha256": _seal(content)}, indent=1) + "\n").encode()


def _seal(content: dict[str, Any]) -> str:
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def read_sealed(path: Path) -> dict[str, Any]:
    """What was `sealed`; CheckpointError if a bit of it has changed."""
    try:
        content = json.loads(read_bytes(path))
        seal = content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path.name}: damaged ({error})") from error
    if seal != _seal(content):
        raise CheckpointError(f"{path.name}: damaged, its checksum differs")
    return content


def read_bytes(path: Path) -> bytes:
    """The whole file; CheckpointError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from error
