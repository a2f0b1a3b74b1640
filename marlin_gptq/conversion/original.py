"""State dicts of the original Marlin repository (*.marlin, *.marlin.g128), read and written.

Per quantized linear such a file holds `B` int32 [K/16, 2N] (our qweight) and `s` float16 [groups, N] (our scales);
everything else has the names it has in the model. There is no config and no tokenizer: those are the base model's. The
group size follows from the shapes.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.checkpoint import can_be_mapped
from marlin_gptq.config import GROUP_SIZES
from marlin_gptq.conversion.settings import ORIGINAL, Layout, stored_settings
from marlin_gptq.conversion.source import Source
from marlin_gptq.destination import Inputs
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.model_directory import read_json, resolve_model
from marlin_gptq.placement import Placement

# Kept by old versions of transformers; today's model computes them.
COMPUTED = ("rotary_emb.inv_freq",)
SCRATCH = ".workspace"
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)


def read_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """Names and tensors, opened with weights_only=True: a file that would run code is refused."""
    if not checkpoint.is_file():
        raise InputError(f"{checkpoint}: no such file; a torch state dict (*.marlin.g128) is needed")
    try:
        content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=can_be_mapped(checkpoint))
    except (*_UNREADABLE, OSError, AssertionError, RecursionError, MemoryError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint}: not a torch state dict that can be read safely ({said}); expected what "
            "torch.save(model.state_dict(), ...) writes"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{checkpoint}: got a {type(content).__name__}, expected a dictionary of tensors")
    return dict(content)


def open_source(path: Path, base: Path | None = None) -> Source:
    """A quantized directory, or a state dict of the original repository with the directory of its base model."""
    if path.is_dir():
        if base is not None:
            raise InputError(f"{base}: a base model goes with a state dict (*.marlin.g128); {path} is a directory")
        return Source.of_directory(path)
    tensors = read_state_dict(path)
    if base is None:
        raise InputError(f"{path}: a state dict has no config; give the model it was made from as base (--base)")
    directory = resolve_model(str(base))
    if stored_settings(directory, read_json(directory / "config.json")) is not None:
        raise InputError(f"{directory}: is quantized itself; give the full-precision model of the state dict")
    store = StateDictStore(path, tensors)
    return Source(directory, store, {}, Layout(ORIGINAL, store.group_size(), True))


class StateDictStore:
    """A state dict that answers like a TensorStore."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.directory = path
        self._tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith((*COMPUTED, SCRATCH))}
        if not any(name.endswith(".B") for name in self._tensors):
            raise CheckpointError(f"{path}: holds no quantized linear (a tensor NAME.B beside NAME.s)")

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def size(self, name: str) -> int:
        """Bytes of the tensor."""
        return self._tensors[name].numel() * self._tensors[name].element_size()

    def group_size(self) -> int:
        """Of the first linear with several groups, -1 if there is none."""
        for name, codes in self._tensors.items():
            scales = self._tensors.get(f"{name.removesuffix('.B')}.s") if name.endswith(".B") else None
            if scales is None or codes.dim() != 2 or scales.dim() != 2 or scales.shape[0] < 2:
                continue
            size, rest = divmod(16 * codes.shape[0], scales.shape[0])
            if rest or size not in GROUP_SIZES:
                raise CheckpointError(
                    f"{name.removesuffix('.B')}.s: got {scales.shape[0]} groups for {16 * codes.shape[0]} input "
                    "features, expected groups of 128"
                )
            return size
        return -1


class StateDictWriter:
    """Collects tensors and saves them in one file, put in its place at the end; the counterpart of CheckpointWriter.

    torch.save needs all tensors at once: the host memory of the quantized model.
    """

    def __init__(self, output: Path, *, overwrite: bool, inputs: Inputs | None = None) -> None:
        self._place = Placement(output, overwrite=overwrite, inputs=inputs or {}, file=True)
        self.output = output
        self.total_bytes = 0
        self._tensors: dict[str, Tensor] = {}

    def __enter__(self) -> StateDictWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._place.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep one tensor."""
        self._tensors[name] = tensor
        self.total_bytes += tensor.numel() * tensor.element_size()

    def finish(self) -> None:
        """Save, and put the file in its place. TakenError: see `Placement.finish`."""
        try:
            with open(self._place.new, "wb") as file:
                torch.save(self._tensors, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.output}: cannot be written ({error})") from error
        self._place.finish()
