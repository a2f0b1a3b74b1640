"""Checkpoint directories written, so that no half of one is ever left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from marlin_gptq.destination import Inputs
from marlin_gptq.disk import to_disk
from marlin_gptq.errors import CheckpointError
from marlin_gptq.model_directory import SAFETENSORS_INDEX, companions
from marlin_gptq.placement import Placement


class CheckpointWriter:
    """Writes a directory in a `Placement`, and puts it in its place at the end.

    with CheckpointWriter(output, shard_size=10**9, overwrite=False) as writer:
        writer.add("model.norm.weight", tensor)    # goes to a shard whenever shard_size bytes are waiting
        writer.write_text("config.json", "…")
        writer.finish()

    inputs  what is read for it, which must not be lost (`require_destination`).
    place   a placement of `output` that was begun before, and is closed by whoever began it.

    Leaving without `finish`, by an exception or otherwise, removes what was written: what stood under `output` before
    stays as it was. A full disk is a CheckpointError that says how much was asked for.

    A shard is written and synced by a thread while the next one fills, so that up to two of them are in memory. What
    goes wrong in the thread is raised by the next `add`, `drain` or `finish`; the thread ends with the `with` block.
    """

    def __init__(
        self,
        output: Path,
        *,
        shard_size: int,
        overwrite: bool = False,
        inputs: Inputs | None = None,
        place: Placement | None = None,
    ) -> None:
        self._own_place = place is None
        self._place = place or Placement(output, overwrite=overwrite, inputs=inputs or {})
        self.output = output
        self.shard_size = shard_size
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-shard")
        self._writing: Future[None] | None = None
        self._staging = torch.empty(0, dtype=torch.uint8)
        self.total_bytes = 0
        self.directory = self._place.new
        self.directory.mkdir(mode=0o700)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._thread.shutdown(cancel_futures=True)  # waits for the shard that is being written
        finally:
            if self._own_place:
                self._place.close()

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
            # A name of a file that is no UTF-8 must not end a run of hours at its last line.
            (self.directory / name).write_text(text, encoding="utf-8", errors="replace")

    def copy_companions(self, source: Path, leave: tuple[str, ...]) -> None:
        """Copy the small files of a model directory (`companions`: tokenizer, generation_config, …), not `leave`."""
        for name in companions(source):
            if name not in leave:
                with self._full_disk_named((source / name).stat().st_size):
                    (self.directory / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(source / name, self.directory / name)

    def drain(self) -> None:
        """Everything added so far is in its shard, and on the disk."""
        self._flush()
        self._settle()

    def finish(self, ready: Callable[[Path], None] | None = None) -> None:
        """Write what waits, name the shards, and put the directory in its place.

        `ready` is called with the complete directory right before that. TakenError: see `Placement.finish`.
        """
        self.drain()
        self._name_shards()
        # mkdtemp and safetensors make private files; the checkpoint gets the rights any new file has here.
        mask = os.umask(0)
        os.umask(mask)
        for path in (*self.directory.rglob("*"), self.directory):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            to_disk(path)
        if ready is not None:
            ready(self.directory)
        self._place.finish()

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
            to_disk(shard)

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
