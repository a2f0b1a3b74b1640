"""Nothing lost: every finished step of a run on disk, so that a killed run goes on where it was.

    run.json                 what the run was started with (arguments, and the facts that its result depends on)
    samples.safetensors      the calibration tokens, so that going on needs neither the data set nor the network
    block-00003.safetensors  the tensors of a finished step, as they will stand in the output
    block-00003.json         its record: checksum of the tensors, digest of the step's input, what the run learnt
    lock                     held while a process works here

Each file is written under another name, synced and renamed; the JSON comes last and makes the step count. Every JSON
carries its own checksum. A step is used again only if all checksums hold and its input is the one that it was made
from: whatever was damaged or does not fit is done again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from marlin_gptq.disk import make_directories, require_space, standing
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.placement import recover
from marlin_gptq.sealed_files import WRITING, read_bytes, read_sealed, sealed, write_whole

logger = logging.getLogger(__name__)

FORMAT = 1
RUN, SAMPLES, LOCK, FINISHING = "run.json", "samples.safetensors", "lock", "finishing.json"
_OURS = re.compile(r"(run|finishing)\.json|samples\.safetensors|[a-z]+-\d{5}\.(json|safetensors)")
# What the lock holds: by it a directory is known as one of ours before there is a run in it.
MARK = b"work directory of marlin-gptq\n"
_PIECES, _PIECE = 64, 4096


@dataclass(frozen=True)
class Step:
    """A finished step: its tensors, on the CPU, and its record."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]


class WorkDirectory:
    """One run's directory. Make it with `new` or `resume`, and use it as a context manager: it holds a lock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.content: dict[str, Any] = {}
        try:
            self._made = make_directories(directory)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"{directory}: cannot be a work directory ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InputError(f"{directory}: another run works there; wait for it, or give another directory") from error
        os.pwrite(self._lock, MARK, 0)

    @classmethod
    def new(cls, directory: Path, arguments: dict[str, Any]) -> WorkDirectory:
        """A directory for a new run; `arguments` (plain JSON) are kept for whoever resumes it."""
        if (directory / RUN).exists():
            raise InputError(
                f"{directory}: holds a run already; go on with it by --resume {directory}, or give another --work-dir"
            )
        if directory.is_dir():
            strange = [file.name for file in directory.iterdir() if file.name not in _before_a_run(directory)]
            if strange:
                raise InputError(f"{directory}: is not empty (it holds {sorted(strange)[0]}); give another --work-dir")
        work = cls(directory)
        work.content = {"format": FORMAT, "id": uuid.uuid4().hex, "arguments": arguments}
        return work

    @classmethod
    def resume(cls, directory: Path) -> WorkDirectory:
        """The directory of a run that was begun before."""
        if not (directory / RUN).is_file():
            raise InputError(
                f"{directory}: holds no {RUN}, so there is no run to go on with; start one with --work-dir {directory}"
            )
        content = read_sealed(directory / RUN)  # before anything is written: it may be the directory of something else
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"{directory / RUN}: is of format {content.get('format')}, this version writes {FORMAT}; "
                "start anew with another --work-dir"
            )
        work = cls(directory)
        work.content = content
        for leftover in directory.glob(f"*{WRITING}"):
            if _OURS.fullmatch(leftover.name.removesuffix(WRITING)):
                leftover.unlink()
        return work

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the lock go. Where no run was begun, what was made for it is removed."""
        if self._lock < 0:
            return
        if not (self.directory / RUN).exists():
            for name in sorted(_before_a_run(self.directory)):
                (self.directory / name).unlink(missing_ok=True)
            for made in self._made:
                with suppress(OSError):  # somebody put something there
                    made.rmdir()
        os.close(self._lock)
        self._lock = -1

    @property
    def id(self) -> str:
        """Names this run; 32 hexadecimal digits."""
        return self.content["id"]

    @property
    def arguments(self) -> dict[str, Any]:
        return self.content["arguments"]

    def fact(self, name: str) -> Any:
        """What a resumed run was begun with, as given to `begin`; None for a new run."""
        return self.content.get("facts", {}).get(name)

    def begin(self, facts: dict[str, Any], samples: list[Tensor]) -> None:
        """Note the facts that the result depends on (plain JSON); of a resumed run, refuse other ones by name."""
        facts = json.loads(json.dumps(facts)) | {"samples": _samples_digest(samples)}
        if "facts" not in self.content:
            content = save({f"{position:06d}": sample for position, sample in enumerate(samples)})
            self._write(SAMPLES, content)
            self.content["facts"] = facts
            self._write(RUN, sealed(self.content))
            return
        for name, now in facts.items():
            then = self.content["facts"].get(name)
            if then != now:
                raise InputError(
                    f"{name}: the run in {self.directory} was begun with {_shown(then, now)}, and is now asked to go "
                    f"on with {_shown(now, then)}; use the same, or start anew with another --work-dir"
                )

    def samples(self) -> list[Tensor]:
        """The calibration samples of a resumed run."""
        file = self.directory / SAMPLES
        try:
            stored = load(file.read_bytes())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: damaged ({error}); start anew with another --work-dir") from error
        samples = [stored[name] for name in sorted(stored)]
        if _samples_digest(samples) != self.content["facts"]["samples"]:
            raise CheckpointError(f"{file}: damaged, its checksum differs; start anew with another --work-dir")
        return samples

    def put(self, step: str, source: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished step. `source` is the digest of its input, `record` plain JSON.

        CheckpointError if the disk is full; the steps before are kept.
        """
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        self._write(f"{step}.safetensors", content)
        checksum = hashlib.sha256(content).hexdigest()
        entry = {"format": FORMAT, "step": step, "input": source, "tensors_sha256": checksum, "record": record}
        entry["names"] = list(tensors)  # safetensors sorts them, and the output's shards follow their order
        self._write(f"{step}.json", sealed(entry))

    def get(self, step: str, source: str) -> Step | None:
        """A finished step whose input had the digest `source`; None, after a warning, for one that cannot be used."""
        if not (self.directory / f"{step}.json").is_file():
            return None
        try:
            entry = read_sealed(self.directory / f"{step}.json")
            if entry.get("format") != FORMAT or entry.get("step") != step:
                raise CheckpointError(f"{step}.json: is not the record of {step} in format {FORMAT}")
            if entry["input"] != source:
                raise CheckpointError(f"{step}: was made from another input than the steps before it give now")
            content = read_bytes(self.directory / f"{step}.safetensors")
            if hashlib.sha256(content).hexdigest() != entry["tensors_sha256"]:
                raise CheckpointError(f"{step}.safetensors: damaged, its checksum differs")
            tensors = load(content)
            return Step({name: tensors[name] for name in entry["names"]}, entry["record"])
        except CheckpointError as error:
            logger.warning("%s: %s; this step is done again", self.directory, error)
            return None

    def require_space(self, size: int, output: Path) -> None:
        """CheckpointError, before any work, if steps of `size` bytes in all do not fit beside what is here.

        On one disk with `output`, that takes as much again.
        """
        stored = sum(file.stat().st_size for file in self.directory.glob("block-*.safetensors"))
        shared = standing(output).stat().st_dev == self.directory.stat().st_dev
        require_space(self.directory, max(0, size - stored) + (size if shared else 0))

    def finishing(self, directory: Path) -> None:
        """Note that `directory` is complete and about to become the output."""
        self._write(FINISHING, sealed({"inode": (directory / "config.json").stat().st_ino}))

    def finished(self, output: Path) -> bool:
        """Whether `output` is what this run made: a run may be killed right after its last rename.

        Then what it replaced may still lie beside it, and is removed.
        """
        recover(output)
        config = output / "config.json"
        if not config.is_file() or not (self.directory / FINISHING).is_file():
            return False
        try:
            return read_sealed(self.directory / FINISHING)["inode"] == config.stat().st_ino
        except CheckpointError:
            return False

    def _write(self, name: str, content: bytes) -> None:
        try:
            write_whole(self.directory / name, content)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = shutil.disk_usage(self.directory).free
                reason = f"the disk is full: {len(content) / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
            raise CheckpointError(
                f"{self.directory}: {reason}; make room and go on with --resume {self.directory}"
            ) from error


def model_digest(model_dir: Path) -> str:
    """SHA-256 of config.json and, of each weight file, its size and 64 pieces of 4 KiB spread over it.

    Reads little of a large model, and yet any other training run, conversion or truncation shows.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in model_dir.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for piece in range(_PIECES):
                file.seek(max(0, size - _PIECE) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _before_a_run(directory: Path) -> set[str]:
    """The names of what a run that was killed before it began, or one that begins, may have in its directory."""
    try:
        mark = (directory / LOCK).read_bytes()
    except OSError:
        return set()
    names = {SAMPLES, f"{SAMPLES}{WRITING}", f"{RUN}{WRITING}"} if mark == MARK else set()
    return names | {LOCK} if mark in (MARK, b"") else names


def _samples_digest(samples: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample)}\n".encode())
        digest.update(sample.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shown(value: Any, other: Any) -> str:
    """A short form of a fact; of two objects, where they differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        return ", ".join(f"{key} {value.get(key)!r}" for key in value if value.get(key) != other.get(key)) or "less"
    return "another one" if isinstance(value, str) and len(value) == 64 else repr(value)
