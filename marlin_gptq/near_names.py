"""What somebody may have meant: names that are nearly the one given, for the sentences of errors."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable


def near(name: str, known: Iterable[str]) -> str:
    """`, did you mean a or b?`, or nothing where no known name is near."""
    close = _close(name, known)[:2]
    return f", did you mean {' or '.join(close)}?" if close else ""


def near_path(path: str, fits: Callable[[str], bool] = os.path.exists) -> str:
    """The same of a path that leads nowhere: what is there under nearly that name, and `fits`, spelled as it was.

    One folder or file of the path may be misspelled; what stands behind it must be right.
    """
    head, behind = path.rstrip("/"), ""
    while os.path.dirname(head) and not os.path.isdir(os.path.dirname(head)):
        head, behind = os.path.dirname(head), os.path.join(os.path.basename(head), behind)
    folder = os.path.dirname(head)
    try:
        entries = os.listdir(folder or ".")
    except OSError:
        return ""
    meant = [os.path.join(folder, name, behind).rstrip("/") for name in _close(os.path.basename(head), entries)]
    close = [other for other in meant if other != path.rstrip("/") and fits(other)][:2]
    return f", did you mean {' or '.join(close)}?" if close else ""


def _close(name: str, known: Iterable[str]) -> list[str]:
    by_lower = {other.lower(): other for other in known}
    return [by_lower[found] for found in difflib.get_close_matches(name.lower(), by_lower, n=5, cutoff=0.5)]
