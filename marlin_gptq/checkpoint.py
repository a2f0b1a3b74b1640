"""Checkpoint directories: find them, read them tensor by tensor, write them so that no half of one is ever left."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
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
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64} | {
    "I32": torch.int32,
    "I64": torch.int64,
}
_DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_model(model: str, revision: str | None = None, offline: bool = False) -> Path:
    """The directory of a model: `model` itself if it is one, else a snapshot of that hub id.

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
        found = snapshot(_DOWNLOADED)
        if not any(found.glob("*.safetensors")):  # an old repository: legacy weights only where there are no others
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
    """A JSON object from a file; CheckpointError if it is missing, broken or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


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
    Raises CheckpointError for missing, truncated or corrupt files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = self._locate()
        self._pickles: dict[Path, dict[str, Tensor]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """The tensor, on the CPU in its stored dtype."""
        file = self._file(name)
        if file.suffix == ".bin":
            return self._pickle(file)[name]
        with _opened(file) as tensors:
            return tensors.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        file = self._file(name)
        if file.suffix == ".bin":
            return tuple(self._pickle(file)[name].shape)
        with _opened(file) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        file = self._file(name)
        if file.suffix == ".bin":
            return self._pickle(file)[name].dtype
        with _opened(file) as tensors:
            stored = tensors.get_slice(name).get_dtype()
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
            if (self.directory / index).is_file():
                return self._from_index(self.directory / index)
            file = self.directory / single
            if file.is_file():
                if file.suffix == ".bin":
                    return dict.fromkeys(_load_pickle(file), file)
                with _opened(file) as tensors:
                    return dict.fromkeys(tensors.keys(), file)
        raise CheckpointError(
            f"{self.directory}: holds no model.safetensors, no pytorch_model.bin and no index of them"
        )

    def _from_index(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: no weight_map from tensor names to file names")
        files = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index}: names the file {shard!r} outside its directory")
            files[shard] = self.directory / shard
            if not files[shard].is_file():
                raise CheckpointError(f"{files[shard]}: missing, but {index.name} names it")
            if files[shard].suffix == ".safetensors":
                with _opened(files[shard]) as tensors:
                    absent = {name for name, file in weight_map.items() if file == shard} - set(tensors.keys())
                if absent:
                    raise CheckpointError(f"{files[shard]}: lacks {sorted(absent)[0]}, which {index.name} places there")
        return {name: files[shard] for name, shard in weight_map.items()}

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        if file not in self._pickles:
            self._pickles[file] = _load_pickle(file)
        return self._pickles[file]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or corrupt ({error}); fetch or copy it again") from error


def _load_pickle(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable weights-only pickle ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: not a dictionary of tensors")
    return content


class CheckpointWriter:
    """Writes a directory under a temporary name beside `output` and renames it at the end.

    with CheckpointWriter(output, shard_size=10**9, overwrite=False) as writer:
        writer.add("model.norm.weight", tensor)    # flushed to a shard whenever shard_size bytes are waiting
        writer.write_text("config.json", "…")
        writer.finish()

    Leaving without `finish`, by an exception or otherwise, removes the temporary directory: what stood under
    `output` before stays as it was. A full disk is a CheckpointError that says how much was asked for.
    """

    def __init__(self, output: Path, *, shard_size: int, overwrite: bool) -> None:
        if output.exists() and not overwrite:
            raise InputError(f"{output}: exists already; give another output or --overwrite")
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: exists and is not a directory; give another output")
        self.output = output
        self.shard_size = shard_size
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0
        try:
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
            self.directory = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.absolute().parent))
        except OSError as error:
            raise InputError(f"{output}: cannot be created there ({error.strerror})") from error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Queue one tensor; it is copied to the CPU."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.shard_size:
            self._flush()
        self._waiting[name] = tensor.detach().to("cpu", copy=tensor.device.type == "cpu").contiguous()
        self._waiting_bytes += size
        self.total_bytes += size

    def write_text(self, name: str, text: str) -> None:
        with self._full_disk_named(len(text)):
            (self.directory / name).write_text(text, encoding="utf-8")

    def copy_companions(self, source: Path, leave: tuple[str, ...]) -> None:
        """Copy the small files of a model directory (tokenizer, generation_config, …), not weights, not `leave`."""
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name not in leave and not file.name.endswith(_WEIGHT_SUFFIXES):
                with self._full_disk_named(file.stat().st_size):
                    shutil.copyfile(file, self.directory / file.name)

    def finish(self) -> None:
        """Write what waits, name the shards, and put the directory in its place in one rename."""
        self._flush()
        self._name_shards()
        # mkdtemp and safetensors make private files; the checkpoint gets the rights any new file has here.
        mask = os.umask(0)
        os.umask(mask)
        self.directory.chmod(0o777 & ~mask)
        for file in self.directory.iterdir():
            file.chmod(0o666 & ~mask)
            _to_disk(file)
        _to_disk(self.directory)
        if self.output.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.old-", dir=self.directory.parent))
            self.output.rename(old / self.output.name)
            self.directory.rename(self.output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.directory.rename(self.output)

    def _flush(self) -> None:
        if not self._waiting:
            return
        shard = self.directory / f"shard-{len(self._shards)}.safetensors"
        with self._full_disk_named(self._waiting_bytes):
            save_file(self._waiting, shard, metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

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


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
