"""How a result gets to its place: made in a folder beside it, put there whole, and nothing else is lost for it.

    .OUT.partial-xxxxxxxx/
        marlin-gptq.lock    held by the run while it lives: whoever gets it may clear the folder away
        new                 the result while it is made
        ready               the result when it is complete
        old                 what stood under OUT, between the two renames that replace it
        aside/              results on the way, such as the Marlin directory that is converted

An OUT that is there and empty (a mounted disk, the current directory) is written into: then the folder lies in OUT, and
at the end the files are moved up, config.json last. A run that is killed leaves the folder; the next run of the same
OUT finds it, puts back what stood under OUT, and removes it.
"""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType

from marlin_gptq.destination import (
    LOCK,
    Inputs,
    is_empty,
    is_partial,
    not_replaceable,
    real_path,
    require_destination,
)
from marlin_gptq.disk import make_directories, to_disk
from marlin_gptq.errors import CheckpointError, InputError

logger = logging.getLogger(__name__)

_KNOWN = {LOCK, "new", "ready", "old", "aside"}


class TakenError(CheckpointError):
    """The place of a result has become something else while it was made; the result is beside it."""


class Placement:
    """A folder to make the result `output` in. As a context manager it is gone in the end, however that comes.

    with Placement(output, overwrite=False, inputs={"the model": model_dir}) as place:
        …                       # write the directory (or file) place.new
        place.finish()          # now it is `output`

    InputError, when it is made, for an output that may not be written (`require_destination`).
    """

    def __init__(self, output: Path, *, overwrite: bool, inputs: Inputs, file: bool = False) -> None:
        recover(output)
        require_destination(output, overwrite=overwrite, inputs=inputs, file=file)
        self.output, self._inputs, self._file = output, inputs, file
        self._target = real_path(output)
        self._before = _identity(self._target)
        self.parent = parent_of(output)
        self._fills = self.parent == self._target
        try:
            self._made = make_directories(self.parent)
            self.folder, self._lock = _own_folder(self.parent, self._target.name)
        except OSError as error:
            raise InputError(f"{output}: cannot be made there ({error.strerror}); give another --output") from error
        self.new = self.folder / "new"
        self._ready = self.folder / "ready"

    def __enter__(self) -> Placement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """What stood under the output is back there, if no result is; the folder is gone, and those made for it."""
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        try:
            _clear(self.folder, self._target)
        except BaseException:  # a signal in the middle of it: only one comes through (cli/failures.py)
            _clear(self.folder, self._target)
            raise
        finally:
            os.close(lock)
            for made in self._made:
                with suppress(OSError):  # the result is in it
                    made.rmdir()

    def aside(self) -> Path:
        """Where a result on the way is made: of the output's name, in a folder of its own."""
        (self.folder / "aside").mkdir(exist_ok=True)
        return self.folder / "aside" / self._target.name

    def finish(self) -> None:
        """Put `new` in its place.

        TakenError if that is not what it was when the run began: it stays as it is, and `new` is kept beside it.
        """
        self.new.rename(self._ready)
        to_disk(self.folder)
        try:
            if self._fills:
                if not is_empty(self._target):
                    raise _ChangedError("has come to hold something while this ran")
                _move_up(self._ready, self._target)
            else:
                self._replace()
        except (_ChangedError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            kept = self.keep(self._ready, "result")
            raise TakenError(f"{self.output}: {reason}; it stays as it is, the finished result is {kept}") from error
        to_disk(self.parent)

    def keep(self, made: Path, kind: str) -> Path:
        """Save a file or directory of the folder from being cleared away; its new place, beside the output."""
        return _keep(made, self.parent, f"{self._target.name}.{kind}")

    def _replace(self) -> None:
        old = self.folder / "old"
        if self._before is not None and _identity(self._target) == self._before:
            self._target.rename(old)  # now nobody puts anything into it any more
            reason = "" if self._file else not_replaceable(old, self._inputs)
            if reason:
                _move(old, self._target)
                raise _ChangedError(f"{reason} now")
        try:
            _move(self._ready, self._target)
        except _ChangedError as error:
            if not os.path.lexists(old):
                raise
            kept = self.keep(old, "old")
            raise _ChangedError(f"{error} (what was to be replaced is {kept})") from error


class _ChangedError(Exception):
    """A place is not what it was; says what has happened to it."""


def parent_of(output: Path) -> Path:
    """Where things on the way to `output` lie, on its disk: its directory, or itself if it is there and empty."""
    target = real_path(output)
    return target if target.is_dir() and is_empty(target) else target.parent


def recover(output: Path) -> None:
    """Clear away what killed runs of this output left, never what a live one writes.

    What such a run had moved out of the way is put back.
    """
    target = real_path(output)
    for parent in (target, target.parent):
        for folder in parent.glob(f".{glob.escape(target.name)}.partial-????????"):
            if not is_partial(folder, target.name) or folder.stat().st_uid != os.geteuid():
                continue
            try:
                lock = _locked(folder / LOCK)
            except OSError:  # a run lives there, or the disk knows no locks, so that one may
                continue
            try:
                if {entry.name for entry in folder.iterdir()} <= _KNOWN:
                    _clear(folder, target)
            finally:
                os.close(lock)


def _own_folder(parent: Path, name: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=parent))
        with suppress(FileNotFoundError, BlockingIOError):  # cleared away before it was locked
            return folder, _locked(folder / LOCK, make=True)


def _locked(file: Path, make: bool = False) -> int:
    """The handle of a locked file; FileNotFoundError if it is gone, BlockingIOError if another process has it."""
    handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if make else 0), 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink == 0:
            raise FileNotFoundError(file)
    except OSError as error:
        if make and not isinstance(error, FileNotFoundError | BlockingIOError):
            return handle  # a disk without locks: what is killed there stays
        os.close(handle)
        raise
    return handle


def _clear(folder: Path, target: Path) -> None:
    """Remove a run's folder, after what is half done in it was undone, or done where that is nearer."""
    if not folder.exists():
        return
    old, ready = folder / "old", folder / "ready"
    if folder.parent == target and ready.is_dir():
        with suppress(_ChangedError, OSError):
            _move_up(ready, target)
    if os.path.lexists(old):
        if not os.path.lexists(target):
            old.rename(target)
        elif os.path.lexists(ready):
            kept = _keep(old, target.parent, f"{target.name}.old")
            logger.warning("%s: what a killed run was about to replace there is %s now", target, kept)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)
    with suppress(OSError):  # the lock last: until then the next run knows what this is
        if {entry.name for entry in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _move_up(ready: Path, target: Path) -> None:
    """The files of `ready` into the directory `target`, config.json last: without it nothing loads them."""
    moved: list[str] = []
    try:
        for file in sorted(ready.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
            _move(file, target / file.name)
            moved.append(file.name)
    except (_ChangedError, OSError):
        for name in moved:
            (target / name).rename(ready / name)
        raise


def _move(source: Path, target: Path) -> None:
    """Rename a file or a directory, but over nothing except an empty directory: _ChangedError."""
    try:
        if source.is_dir():
            source.rename(target)  # fails where a file or anything in a directory would be lost
            return
        os.link(source, target)  # fails where there is anything
    except OSError as error:
        if not os.path.lexists(target):
            source.rename(target)  # a disk without hard links, or the reason once more
            return
        if source.is_dir() or not source.samefile(target):
            raise _ChangedError("has come to be while this ran") from error
    source.unlink()


def _keep(made: Path, parent: Path, name: str) -> Path:
    for number in count(1):
        place = parent / (name if number == 1 else f"{name}-{number}")
        if not os.path.lexists(place):
            with suppress(_ChangedError):
                _move(made, place)
                return place
    raise AssertionError("there is always a free name")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of what is there; None for nothing."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
