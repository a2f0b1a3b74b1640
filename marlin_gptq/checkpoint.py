"""Checkpoint directories: find them, read them tensor by tensor, write them so that no half of one is ever left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlin_gptq.errors import CheckpointError, InputError

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_LARGEST_JSON = 10**8  # bytes; an index of a million tensors has less
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64} | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_model(model: str, revision: str | None = None, offline: bool = False, config_only: bool = False) -> Path:
    """The directory of a model: `model` itself if it is one, else a snapshot of that hub id.

    config_only  fetch config.json of a hub id and nothing else.
    Raises InputError if there is neither, or if a hub id is not in the local cache while `offline`.
    """
    path = Path(model)
    if model.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{model}: holds no config.json; a Hugging Face model directory is needed")
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip():
        raise InputError(f"{model}: no such directory; give a model directory or a hub id such as owner/name")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def snapshot(patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, local_files_only=offline, allow_patterns=patterns))

    try:
        found = snapshot(["config.json"] if config_only else _DOWNLOADED)
        if not config_only and not any(
            found.glob("*.safetensors")
        ):  # an old repository: legacy weights only where there are no others
            found = snapshot([*_DOWNLOADED, "pytorch_model*.bin"])
    except HFValidationError as error:
        raise InputError(f"{model}: no such directory and no hub id; give one of them") from error
    except LocalEntryNotFoundError as error:
        how = "run once without --offline" if offline else "check the network"
        raise InputError(f"{model}: no such directory and not in the local cache of the hub; {how}") from error
    except HfHubHTTPError as error:
        raise InputError(
            f"{model}: refused by the hub ({error.__class__.__name__}); check the name, the revision and your access"
        ) from error
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError if it is missing, broken or something else, a key given twice too."""
    try:
        require_inside(path.parent, path.name)
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than a file of settings can have")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:  # broken UTF-8 and JSON are ValueErrors
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return content


def require_inside(directory: Path, name: str) -> Path:
    """`directory`/`name`, if that is a regular file of this directory; FileNotFoundError if there is none.

    Nothing outside a checkpoint directory is read on its behalf: CheckpointError for a name with a folder in it, a
    link that leads outside, a pipe or a device. The one way out are the links that the hub's cache is made of, from
    snapshots/REVISION to blobs/ of the same model.
    """
    path = directory / name
    if name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise CheckpointError(f"{directory}: names the file {name!r} outside its directory")
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            real, home = path.resolve(strict=True), directory.resolve()
            cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
            if not cached and not real.is_relative_to(home):
                raise CheckpointError(f"{path}: a link to {real}, outside its directory; copy the file into it")
            mode = real.stat().st_mode
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long, not encodable, a loop of links
        raise CheckpointError(
            f"{directory}: {name!r:.80} is no readable file of it ({type(error).__name__})"
        ) from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    return path


def _is_file(directory: Path, name: str) -> bool:
    try:
        require_inside(directory, name)
    except FileNotFoundError:
        return False
    return True


def require_space(output: Path, size: int) -> None:
    """CheckpointError, before any work, if `size` bytes do not fit on the disk of `output`."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise CheckpointError(
            f"{output}: the disk is full: {size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free; make room "
            "or choose another output"
        )


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


class TensorStore:
    """The tensors of a checkpoint directory, read one at a time and never more than asked for.

    Safetensors, sharded or not; where there are none, legacy pytorch_model.bin files, opened with weights_only=True.
    Raises CheckpointError for missing, truncated or corrupt files, for files outside the directory
    (`require_inside`), and for a tensor that two shards hold.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}  # shape and stored dtype, of safetensors
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        self._file_of = self._locate()

    @property
    def names(self) -> list[str]:
        """All of them, file by file."""
        return list(self._file_of)

    @property
    def files(self) -> list[Path]:
        """The files they are in."""
        return list(dict.fromkeys(self._file_of.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU in its stored dtype."""
        file = self._file(name)
        if file.suffix == ".bin":
            return self._pickle(file)[name]
        self.dtype(name)  # CheckpointError for one that torch has no word for
        with _opened(file) as tensors:
            return tensors.get_tensor(name)

    def get_part(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """tensor[index] without reading the rest."""
        file = self._file(name)
        if file.suffix == ".bin":
            return self._pickle(file)[name][index]
        with _opened(file) as tensors:
            return tensors.get_slice(name)[index]

    def shape(self, name: str) -> tuple[int, ...]:
        file = self._file(name)
        if file.suffix == ".bin":
            return tuple(self._pickle(file)[name].shape)
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        file = self._file(name)
        if file.suffix == ".bin":
            return self._pickle(file)[name].dtype
        stored = self._headers[name][1]
        if stored not in _DTYPES:
            raise CheckpointError(f"{name}: stored as {stored}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def size(self, name: str) -> int:
        """Bytes of the tensor as stored."""
        elements = 1
        for length in self.shape(name):
            elements *= length
        return elements * self.dtype(name).itemsize

    def _file(self, name: str) -> Path:
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory}: holds no tensor {name}")
        return self._file_of[name]

    def _locate(self) -> dict[str, Path]:
        for index, single in ((SAFETENSORS_INDEX, "model.safetensors"), (PICKLE_INDEX, "pytorch_model.bin")):
            if _is_file(self.directory, index):
                return self._from_index(self.directory / index)
            if _is_file(self.directory, single):
                return self._from_file(self.directory / single)
        others = sorted(self.directory.glob("*.safetensors"))
        if len(others) == 1:  # community checkpoints name their one file after the model
            return self._from_file(require_inside(self.directory, others[0].name))
        raise CheckpointError(
            f"{self.directory}: holds no model.safetensors, no pytorch_model.bin and no index of them"
        )

    def _from_file(self, file: Path) -> dict[str, Path]:
        return dict.fromkeys(self._read_header(file), file)

    def _from_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: no weight_map from tensor names to file names")
        wanted: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            wanted.setdefault(shard, []).append(name)
        found: dict[str, Path] = {}
        holder: dict[str, str] = {}
        for shard, names in sorted(wanted.items()):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index}: names the file {shard!r} outside its directory")
            try:
                file = require_inside(self.directory, shard)
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.directory / shard}: missing, but {index.name} names it") from error
            held = self._read_header(file)
            if absent := sorted(set(names) - held):
                raise CheckpointError(f"{file}: lacks {absent[0]}, which {index.name} places there")
            if twice := sorted(name for name in held if name in holder):
                raise CheckpointError(
                    f"{index}: two shards hold {twice[0]}, {holder[twice[0]]} and {shard}; only one may"
                )
            holder |= dict.fromkeys(held, shard)
            found |= dict.fromkeys(names, file)
        return found

    def _read_header(self, file: Path) -> set[str]:
        """The names a file holds; shapes and dtypes of safetensors are kept."""
        if file.suffix == ".bin":
            return set(self._pickle(file))
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file}: neither a .safetensors nor a .bin file")
        with _opened(file) as tensors:
            names = list(tensors.keys())
            for name in names:
                part = tensors.get_slice(name)
                self._headers[name] = (tuple(part.get_shape()), part.get_dtype())
        return set(names)

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        if file not in self._pickles:
            self._pickles[file] = _load_pickle(file)
        return self._pickles[file]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: truncated or corrupt ({error}); fetch or copy it again") from error


# What torch's unpickler raises on bytes that are no pickle of tensors.
_NO_PICKLE = (EOFError, ValueError, TypeError, AttributeError, AssertionError, RecursionError, MemoryError)


def _load_pickle(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, LookupError, *_NO_PICKLE) as error:
        raise CheckpointError(f"{file}: not a readable weights-only pickle ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: not a dictionary of tensors")
    return content


class CheckpointWriter:
    """Writes a directory under a temporary name beside `output` and renames it at the end.

    with CheckpointWriter(output, shard_size=10**9, overwrite=False) as writer:
        writer.add("model.norm.weight", tensor)    # goes to a shard whenever shard_size bytes are waiting
        writer.write_text("config.json", "…")
        writer.finish()

    Leaving without `finish`, by an exception or otherwise, removes the temporary directory: what stood under
    `output` before stays as it was. A full disk is a CheckpointError that says how much was asked for.

    A shard is written and synced by a thread while the next one fills, so that up to two of them are in memory. What
    goes wrong in the thread is raised by the next `add`, `drain` or `finish`; the thread ends with the `with` block.

    A killed process leaves its temporary directory behind. With `run`, the name of a run that may be resumed, the
    next writer of that run removes it, and puts back what stood under `output` if it was killed between two renames.
    """

    def __init__(self, output: Path, *, shard_size: int, overwrite: bool, run: str | None = None) -> None:
        self._run = run
        if run is not None:
            tidy_up(output, run)
        if output.exists() and not overwrite:
            raise InputError(f"{output}: exists already; give another output or --overwrite")
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: exists and is not a directory; give another output")
        self.output = output
        self.shard_size = shard_size
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-shard")
        self._writing: Future[None] | None = None
        self._staging = torch.empty(0, dtype=torch.uint8)
        self.total_bytes = 0
        try:
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
            self.directory = self._beside(output, "partial")
        except OSError as error:
            raise InputError(f"{output}: cannot be created there ({error.strerror})") from error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._thread.shutdown(cancel_futures=True)  # waits for the shard that is being written
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; it is copied to the CPU."""
        if self._writing is not None and self._writing.done():
            self._settle()
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.shard_size:
            self._flush()
        self._waiting[name] = self._copied(tensor.detach())
        self._waiting_bytes += size
        self.total_bytes += size

    def write_text(self, name: str, text: str) -> None:
        with self._full_disk_named(len(text)):
            (self.directory / name).write_text(text, encoding="utf-8")

    def copy_companions(self, source: Path, leave: tuple[str, ...]) -> None:
        """Copy the small files of a model directory (tokenizer, generation_config, …), not weights, not `leave`."""
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in leave and not file.name.endswith(_WEIGHT_SUFFIXES):
                require_inside(source, file.name)
                with self._full_disk_named(file.stat().st_size):
                    shutil.copyfile(file, self.directory / file.name)

    def drain(self) -> None:
        """Everything added so far is in its shard, and on the disk."""
        self._flush()
        self._settle()

    def finish(self, ready: Callable[[Path], None] | None = None) -> None:
        """Write what waits, name the shards, and put the directory in its place in one rename.

        `ready` is called with the complete directory right before that.
        """
        self.drain()
        self._name_shards()
        # mkdtemp and safetensors make private files; the checkpoint gets the rights any new file has here.
        mask = os.umask(0)
        os.umask(mask)
        self.directory.chmod(0o777 & ~mask)
        for file in self.directory.iterdir():
            file.chmod(0o666 & ~mask)
            _to_disk(file)
        _to_disk(self.directory)
        if ready is not None:
            ready(self.directory)
        if self.output.exists():
            old = self._beside(self.output, "old")
            self.output.rename(old / self.output.name)
            self.directory.rename(self.output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.directory.rename(self.output)

    def _beside(self, output: Path, kind: str) -> Path:
        """A new directory in that of `output`: of the name this run always uses, if it has one."""
        if self._run is None:
            return Path(tempfile.mkdtemp(prefix=f".{output.name}.{kind}-", dir=output.absolute().parent))
        made = output.absolute().parent / f".{output.name}.{kind}-{self._run}"
        made.mkdir(mode=0o700)
        return made

    def _copied(self, tensor: Tensor) -> Tensor:
        """In host memory of its own; from a GPU by way of page-locked memory, because pageable copies crawl."""
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=tensor.device.type == "cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        if self._staging.numel() < size:
            self._staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        staged = self._staging[:size].view(tensor.dtype).view(tensor.shape)
        return staged.copy_(tensor).clone()

    def _flush(self) -> None:
        """Hand what waits to the thread, once that is done with the shard before."""
        if not self._waiting:
            return
        self._settle()
        shard = self.directory / f"shard-{len(self._shards)}.safetensors"
        self._shards.append(list(self._waiting))
        self._writing = self._thread.submit(self._write_shard, shard, self._waiting, self._waiting_bytes)
        self._waiting, self._waiting_bytes = {}, 0

    def _settle(self) -> None:
        """Wait for the shard that is being written; what went wrong there is raised here."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write_shard(self, shard: Path, tensors: dict[str, Tensor], size: int) -> None:
        with self._full_disk_named(size):
            save_file(tensors, shard, metadata={"format": "pt"})
            _to_disk(shard)

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            (self.directory / "shard-0.safetensors").rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for position, names in enumerate(self._shards):
            file = f"model-{position + 1:05d}-of-{count:05d}.safetensors"
            (self.directory / f"shard-{position}.safetensors").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        self.write_text(SAFETENSORS_INDEX, json.dumps(index, indent=1) + "\n")

    @contextmanager
    def _full_disk_named(self, size: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = getattr(error, "errno", None)
            text = str(error)
            if number == errno.ENOSPC or "No space left" in text or "os error 28" in text:
                free = shutil.disk_usage(self.directory).free
                raise CheckpointError(
                    f"{self.output.absolute().parent}: the disk is full: {size / 1e6:.1f} MB were to be written and "
                    f"{free / 1e6:.1f} MB are free; make room or choose another output"
                ) from error
            raise CheckpointError(f"{self.output}: cannot be written ({error})") from error


def tidy_up(output: Path, run: str) -> None:
    """After a kill of the run of that name: what stood under `output` back in its place, leftovers away."""
    partial, old = (output.absolute().parent / f".{output.name}.{kind}-{run}" for kind in ("partial", "old"))
    if (old / output.name).exists() and not output.exists():
        (old / output.name).rename(output)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
