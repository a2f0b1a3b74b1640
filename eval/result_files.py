"""Files of results, JSON and HTML: written whole or not at all, and never over a file that is something else."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

from marlin_gptq.errors import InputError
from marlin_gptq.sealed_files import write_whole

# What every JSON result has, and what stands near the beginning of every page.
_KEYS = {"complete", "settings", "versions"}
TITLE_END = ": evaluation</title>"
_BEGINNING = 2_000  # characters


def require_result_file(file: Path) -> None:
    """InputError, before any work, for a file that cannot be written, or that is there and no earlier result."""
    parent = file.absolute().parent
    if not parent.is_dir():
        raise InputError(f"{file}: its directory does not exist; make it, or give another --output")
    if os.path.lexists(file) and not is_result(file):
        raise InputError(f"{file}: exists and is no result of marlin-eval, so it stays; give another --output")
    if not os.access(Path(os.path.realpath(file)).parent, os.W_OK | os.X_OK):
        raise InputError(f"{file}: its directory cannot be written to; give another --output")


def is_result(file: Path) -> bool:
    """Whether `file` is a result of this package, or empty, or a link to nothing yet: such may be written anew."""
    if not file.exists():
        return file.is_symlink() and not Path(os.path.realpath(file)).is_symlink()
    if not file.is_file():
        return False
    try:
        text = file.read_text("utf-8")
        if not text.strip():
            return True
        if file.suffix == ".json" or text.startswith("{"):
            content = json.loads(text)
            return isinstance(content, dict) and content.keys() >= _KEYS
    except (OSError, ValueError, RecursionError):  # broken UTF-8 and JSON are ValueErrors
        return False
    return TITLE_END in text[:_BEGINNING]


def write_json(file: Path, content: dict[str, Any]) -> Path:
    """A JSON object, as `write_text` writes."""
    return write_text(file, json.dumps(content, indent=1) + "\n")


def write_text(file: Path, text: str) -> Path:
    """UTF-8, whole or not at all; a link stays one. The file that was written.

    That is a new one beside `file` where something else has come to be under its name.
    """
    place = Path(os.path.realpath(file))
    if os.path.lexists(place) and not is_result(place):
        others = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in count(2))
        file = place = next(other for other in others if not os.path.lexists(other))
    write_whole(place, text.encode())
    return file


def require_as_asked(asked: Path, *written: Path) -> None:
    """InputError, after the work, if results had to be written elsewhere than in `asked` and what belongs to it."""
    elsewhere = [str(file) for file in written if file.stem != asked.stem]
    if elsewhere:
        raise InputError(
            f"{asked}: has come to be while this ran, so it stays; the results are {' and '.join(elsewhere)}"
        )
