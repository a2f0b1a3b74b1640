"""The weights of a streamed model: where each tensor lies in the checkpoint's files, and reading it from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import CheckpointError, InputError
from marlin_gptq.modeling.architecture import require_finite
from marlin_gptq.modeling.experts import file_name, fused_source
from marlin_gptq.modeling.read_ahead import ReadAhead, Source, read


class StreamedWeights:
    """Of a model without weights on `meta`: parameters and persistent buffers come when asked for, and go again.

    Modules outside the blocks (embeddings, positions, norms, projections, the head) ask when they are called.

    prefix, blocks  full name of the list of decoder blocks, and these, which are not in `model` themselves.
    settings        of a quantized checkpoint, else None.
    device          where what is read goes.
    """

    def __init__(
        self,
        model: Any,
        prefix: str,
        blocks: Sequence[nn.Module],
        store: TensorStore,
        settings: QuantizationConfig | None,
        device: torch.device,
    ) -> None:
        self.model, self.prefix, self.blocks, self.config = model, prefix, blocks, model.config
        self.store, self.settings, self.device = store, settings, device
        self._tied = self._tied_names()
        self._ahead = ReadAhead(store, device)
        self._outer = [pair for pair in model.named_modules() if any(True for _ in pair[1].parameters(recurse=False))]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._load_called, name))

    def block_name(self, index: int) -> str:
        """Full name, for instance `model.layers.0`."""
        return f"{self.prefix}.{index}"

    def load_block(self, index: int) -> None:
        self._load(self.blocks[index].named_modules(prefix=self.block_name(index)))

    def release_outer(self) -> None:
        """Let go what modules outside the blocks read; they read it again when they are called."""
        for _, module in self._outer:
            release(module)

    def read_ahead(self, index: int) -> None:
        """Begin to read block `index` into host memory; `close` ends it."""
        modules = self.blocks[index].named_modules(prefix=self.block_name(index))
        self._ahead.start({name: self._source(name, like) for _, _, name, like in self._absent(modules)})

    def close(self) -> None:
        """End the thread that reads ahead, if one began."""
        self._ahead.close()

    def outer_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter outside the blocks as it stands in the files, on the CPU; of tied ones the stored one."""
        for prefix, module in self._outer:
            for own, _ in module.named_parameters(recurse=False):
                if (name := f"{prefix}.{own}") in self.store:
                    yield name, self.store.get(name)

    def elements(self) -> Iterator[tuple[str, int]]:
        """(name, number of elements) of every tensor the model takes from its files; of tied ones the stored one."""
        for index, block in enumerate(self.blocks):
            for name, tensor in persistent(block):
                yield f"{self.block_name(index)}.{name}", tensor.numel()
        for prefix, module in self._outer:
            for own, parameter in module.named_parameters(recurse=False):
                if (name := f"{prefix}.{own}") in self.store:
                    yield name, parameter.numel()

    def file_name(self, name: str) -> str:
        """What checkpoint files call the tensor that the model calls `name`."""
        return file_name(name, self.config)

    def unknown_tensors(self) -> list[str]:
        """Names in the files that the architecture has no place for (rotary tables of old checkpoints aside)."""
        known: set[str] = set()
        for index, block in enumerate(self.blocks):
            for name, tensor in persistent(block):
                full = f"{self.block_name(index)}.{name}"
                fused = fused_source(full, self.config, tensor.shape)
                known |= {full, self.file_name(full)} | ({fused[0], self.file_name(fused[0])} if fused else set())
        known |= {f"{prefix}.{own}" for prefix, module in self._outer for own in module._parameters}
        return sorted(name for name in set(self.store.names) - known if not name.endswith("rotary_emb.inv_freq"))

    def _load_called(self, name: str, module: nn.Module, _: tuple) -> None:
        """A hook before the forward of a module outside the blocks; lists of parameters are read with their owner."""
        self._load([(name, module)])
        for own, child in module.named_children():
            if type(child).forward is nn.Module.forward:
                self._load_called(f"{name}.{own}" if name else own, child, ())

    def _load(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Read every parameter and persistent buffer of these modules themselves that is still without data."""
        for module, own, full, like in self._absent(modules):
            tensor = self._read(full, like)
            parameter = isinstance(like, nn.Parameter)
            setattr(module, own, nn.Parameter(tensor, requires_grad=False) if parameter else tensor)

    @staticmethod
    def _absent(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[nn.Module, str, str, Tensor]]:
        """(module, name in it, full name, itself) of every parameter and persistent buffer without data."""
        found: list[tuple[nn.Module, str, str, Tensor]] = []
        for name, module in modules:
            named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            found += [(module, own, f"{name}.{own}" if name else own, like) for own, like in named if like.is_meta]
        return found

    def _read(self, name: str, like: Tensor) -> Tensor:
        tensor = self._ahead.take(name)
        if tensor is None:
            tensor = read(self.store, self._source(name, like))
        if tensor.shape != like.shape:
            raise CheckpointError(f"{name}: got {list(tensor.shape)}, expected {list(like.shape)} from config.json")
        if tensor.is_floating_point() != like.is_floating_point():
            raise CheckpointError(f"{name}: got {tensor.dtype}, expected {like.dtype}")
        there = tensor.to(self.device)  # first, because a GPU checks much faster
        require_finite(name, there, "the checkpoint is damaged")
        moved = there.to(like.dtype)
        if like.dtype == torch.float16 and tensor.dtype != torch.float16:
            require_finite(name, moved, "float16 overflows; use --dtype bfloat16")
        return moved

    def _source(self, name: str, like: Tensor) -> Source:
        """(tensor in the files, part of it or None for all): files may hold the experts of a layer in one tensor."""
        fused = None if name in self.store else fused_source(name, self.config, like.shape)
        for stored in (fused[0], self.file_name(fused[0])) if fused else ():
            if stored in self.store:
                return stored, fused[1] if fused else None
        return self._stored_name(name), None

    def _stored_name(self, name: str) -> str:
        """Files may use another name, and tied weights stand in them under one name only."""
        for stored in (name, self.file_name(name)):
            if stored in self.store:
                return stored
        source = self._tied.get(name)
        if source is not None and source in self.store:
            return source
        strangers = self.unknown_tensors()
        if strangers:
            raise InputError(
                f"{type(self.model).__name__}: not understood: its files hold {strangers[0]} and no {name}, that is, "
                "they store the model in another form than this version of transformers runs it"
            )
        raise CheckpointError(f"{self.store.directory}: the tensor {name} is missing; fetch the checkpoint again")

    def _tied_names(self) -> dict[str, str]:
        if not getattr(self.config, "tie_word_embeddings", False):
            return {}
        names = {id(module): name for name, module in self.model.named_modules()}
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if head is None:
            return {}
        one, other = f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"
        return {one: other, other: one}

    def require_complete(self) -> None:
        """CheckpointError, before any work, for a tensor the architecture needs and the files lack or misshape."""
        for index, block in enumerate(self.blocks):
            for name, tensor in persistent(block):
                self._require_shape(f"{self.block_name(index)}.{name}", tensor)
        for prefix, module in self._outer:
            for own, parameter in module.named_parameters(recurse=False):
                self._require_shape(f"{prefix}.{own}", parameter)

    def _require_shape(self, name: str, like: Tensor) -> None:
        stored, part = self._source(name, like)
        shape = list(self.store.shape(stored))
        if part is not None:
            experts, rows, columns = shape
            if part[0] >= experts:
                raise CheckpointError(f"{stored}: holds {experts} experts, config.json names more ({name})")
            shape = [len(range(*part[1].indices(rows))), columns]
        if shape != list(like.shape):
            hint = ""
            if name.endswith(".scales") and self.settings is not None:
                hint = f" and group_size {self.settings.group_size_of(name.removesuffix('.scales'))}"
            raise CheckpointError(f"{name}: got {shape}, expected {list(like.shape)} from config.json{hint}")


def stored_dtype(store: TensorStore, quantized: bool) -> torch.dtype:
    """The float dtype of a checkpoint's linears: that of their scales, if it is quantized."""
    ending = ".scales" if quantized else "_proj.weight"
    named = [name for name in store.names if name.endswith(ending)] or store.names
    if not named:
        raise CheckpointError(f"{store.directory}: its weight files hold no tensor")
    dtype = store.dtype(named[0])
    return dtype if dtype.is_floating_point else torch.float16


def persistent(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    temporary = {
        f"{name}.{own}" if name else own
        for name, module in block.named_modules()
        for own in module._non_persistent_buffers_set
    }
    yield from ((name, buffer) for name, buffer in block.named_buffers() if name not in temporary)


def release(root: nn.Module) -> None:
    for module in root.modules():
        for own, parameter in module.named_parameters(recurse=False):
            setattr(module, own, nn.Parameter(parameter.to("meta"), requires_grad=False))
        for own, buffer in module.named_buffers(recurse=False):
            if own not in module._non_persistent_buffers_set:
                module._buffers[own] = buffer.to("meta")
