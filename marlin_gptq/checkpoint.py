"""Checkpoint directories read tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marlin_gptq.errors import CheckpointError
from marlin_gptq.model_directory import PICKLE_INDEX, SAFETENSORS_INDEX, holds_file, read_json, require_inside

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64} | {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_PICKLES = (".bin", ".pt")
# Files of weights by their endings, in the order in which they are preferred where none has the usual name.
_ENDINGS = ((".safetensors.index.json",), (".safetensors",), (".bin.index.json",), _PICKLES)
# What such files are called that hold no model in transformers' form: adapters, Mistral's own form, a training's state.
_OTHERS = (
    "adapter_",
    "consolidated",
    "optimizer",
    "scheduler",
    "scaler",
    "training_args",
    "rng_state",
    "random_states",
)


class CheckpointWarning(UserWarning):
    """Something about a checkpoint that its user should know."""


def weights_of(directory: Path) -> Path:
    """The file of weights, or the index of several, that transformers would load from a directory.

    Where none has one of its names, the only one there is, whatever its name: community checkpoints call it after the
    model. Warns (CheckpointWarning) of an index beside the file that goes before it; CheckpointError for none.
    """
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if holds_file(directory, config.name) else None
    if named is not None:
        if not isinstance(named, str) or not holds_file(directory, named):
            raise CheckpointError(
                f"{config}: transformers_weights: got {named!r:.80}, which is no file of its directory"
            )
        return directory / named
    for single, index in (("model.safetensors", SAFETENSORS_INDEX), ("pytorch_model.bin", PICKLE_INDEX)):
        if holds_file(directory, single):
            if holds_file(directory, index) and set(_weight_map(directory / index).values()) != {single}:
                warnings.warn(
                    f"{directory}: holds {single} and {index}, which names other files: {single} is read, as "
                    "transformers does; remove the one that is out of date",
                    CheckpointWarning,
                    stacklevel=2,
                )
            return directory / single
        if holds_file(directory, index):
            return directory / index
    return _only_weights(directory)


def _only_weights(directory: Path) -> Path:
    names = sorted(file.name for file in directory.iterdir())
    for endings in _ENDINGS:
        found = [name for name in names if name.endswith(endings) and not name.startswith(_OTHERS)]
        if len(found) == 1:
            return require_inside(directory, found[0])
        if found:
            break
    else:
        found = [name for name in names if name.endswith(tuple(ending for some in _ENDINGS for ending in some))]
    there = f"; {', '.join(found[:3])}{' …' if found[3:] else ''} cannot stand for them" if found else ""
    raise CheckpointError(
        f"{directory}: holds no model.safetensors, no pytorch_model.bin and no index of them{there}; fetch the whole "
        "checkpoint"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor names, from an index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map from tensor names to file names")
    return weight_map


class TensorStore:
    """The tensors of a checkpoint directory, read one at a time and never more than asked for.

    Safetensors, sharded or not; where there are none, legacy .bin files, opened with weights_only=True (`weights_of`
    says which).
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
        if file.suffix in _PICKLES:
            return self._pickle(file)[name]
        self.dtype(name)  # CheckpointError for one that torch has no word for
        with _opened(file) as tensors:
            return tensors.get_tensor(name)

    def get_part(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """tensor[index] without reading the rest."""
        file = self._file(name)
        if file.suffix in _PICKLES:
            return self._pickle(file)[name][index]
        with _opened(file) as tensors:
            return tensors.get_slice(name)[index]

    def shape(self, name: str) -> tuple[int, ...]:
        file = self._file(name)
        if file.suffix in _PICKLES:
            return tuple(self._pickle(file)[name].shape)
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        file = self._file(name)
        if file.suffix in _PICKLES:
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
        file = weights_of(self.directory)
        return self._from_index(file) if file.suffix == ".json" else self._from_file(file)

    def _from_file(self, file: Path) -> dict[str, Path]:
        return dict.fromkeys(self._read_header(file), file)

    def _from_index(self, index: Path) -> dict[str, Path]:
        wanted: dict[str, list[str]] = {}
        for name, shard in _weight_map(index).items():
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
        if file.suffix in _PICKLES:
            return set(self._pickle(file))
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file}: none of .safetensors, .bin and .pt, which can be read")
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


def can_be_mapped(file: Path) -> bool:
    """Whether a pickle of torch is a zip archive: before torch 1.6 they were none."""
    with file.open("rb") as content:
        return content.read(4) == b"PK\3\4"


# What torch's unpickler raises on bytes that are no pickle of tensors.
_NO_PICKLE = (EOFError, ValueError, TypeError, AttributeError, AssertionError, RecursionError, MemoryError)


def _load_pickle(file: Path) -> dict[str, Tensor]:
    import pickle

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=can_be_mapped(file))
    except (pickle.UnpicklingError, RuntimeError, OSError, LookupError, *_NO_PICKLE) as error:
        raise CheckpointError(
            f"{file}: not a readable weights-only pickle ({' '.join(str(error).split())[:200]})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: not a dictionary of tensors")
    return content
