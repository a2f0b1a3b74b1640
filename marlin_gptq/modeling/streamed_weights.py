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
from marlin_gptq.modeling.architecture import decoder_of, is_within, require_finite, warn_if_lost
from marlin_gptq.modeling.classes import text_config
from marlin_gptq.modeling.experts import fused_source, projection_names
from marlin_gptq.modeling.names import StoredNames, above
from marlin_gptq.modeling.read_ahead import ReadAhead, Source, read


class StreamedWeights:
    """Of a model without weights on `meta`: parameters and persistent buffers come when asked for, and go again.

    Modules outside the blocks (embeddings, positions, norms, projections, the head) ask when they are called.

    prefix, blocks  full name of the list of decoder blocks, and these, which are not in `model` themselves.
    names           of its tensors in the files.
    settings        of a quantized checkpoint, else None.
    device          where what is read goes.
    """

    def __init__(
        self,
        model: Any,
        prefix: str,
        blocks: Sequence[nn.Module],
        store: TensorStore,
        names: StoredNames,
        settings: QuantizationConfig | None,
        device: torch.device,
    ) -> None:
        self.model, self.prefix, self.blocks = model, prefix, blocks
        self.store, self.names, self.settings, self.device = store, names, settings, device
        self._above, self._projections = above(model), projection_names(model)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._tied = {other: one for one, other in tied.items()} | tied
        self._give_up_buffers()
        self._ahead = ReadAhead(store, device)
        self._outer = list(self._text_modules())
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._load_called, name))

    def block_name(self, index: int) -> str:
        """Full name, for instance `model.layers.0`."""
        return f"{self.prefix}.{index}"

    def load_block(self, index: int) -> None:
        self._load(self.blocks[index].named_modules(prefix=self.block_name(index)))

    def load_outer(self, module: nn.Module) -> None:
        """Of one module outside the blocks, ahead of its call: a model may ask before on which device its weight is."""
        self._load(pair for pair in self._outer if pair[1] is module)

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

    def outer_names(self) -> list[str]:
        """Names in the files of every tensor outside the blocks: of the decoder, its head, and all else (a vision
        part, a projector), in the form they have in the files; of tied ones the stored one."""
        inside = f"{self.prefix}."
        outer = [stored for stored, name in self.names.known.items() if not name.startswith(inside)]
        return [*outer, *sorted(self.names.converted)]

    def outer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Those of `outer_names` as they stand in the files, on the CPU."""
        yield from ((name, self.store.get(name)) for name in self.outer_names())

    def as_stored(self, name: str) -> Tensor:
        """A buffer that blocks keep, as the files have it: a router's may be float32 in a model of 16 bits."""
        return self.store.get(self.names.stored(name) or name)

    def elements(self) -> Iterator[tuple[str, int, torch.dtype | None]]:
        """(name, number of elements, dtype) of every tensor of a result; outside the blocks by the files' name.

        The dtype is None where it is that of the result."""
        for index, block in enumerate(self.blocks):
            for own, tensor in persistent(block):
                name = f"{self.block_name(index)}.{own}"
                kept = not isinstance(tensor, nn.Parameter) and self.names.stored(name)
                yield name, tensor.numel(), self.store.dtype(kept) if kept else None
        for name in self.outer_names():
            dtype = self.store.dtype(name)
            yield name, torch.Size(self.store.shape(name)).numel(), None if dtype.is_floating_point else dtype

    def file_name(self, name: str) -> str:
        """What files of a result call the tensor that the model calls `name`."""
        return self.names.written(name)

    def unknown_tensors(self) -> list[str]:
        """Names in the files that the architecture has no place for (rotary tables of old checkpoints aside)."""
        known = self.names.known.keys() | self.names.converted
        return sorted(name for name in set(self.store.names) - known if not name.endswith("rotary_emb.inv_freq"))

    def _give_up_buffers(self) -> None:
        """Persistent buffers: what files hold comes from there as weights do; others keep the values they were made
        with, and are not stored."""
        for prefix, root in [("", self.model), *((self.block_name(i), block) for i, block in enumerate(self.blocks))]:
            for name, module in root.named_modules(prefix=prefix):
                for own, buffer in module.named_buffers(recurse=False):
                    if own in module._non_persistent_buffers_set or buffer.is_meta:
                        continue
                    if self.names.stored(f"{name}.{own}".removeprefix(".")) is None:
                        module._non_persistent_buffers_set.add(own)
                    else:
                        module._buffers[own] = buffer.to("meta")

    def _text_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules outside the blocks that text passes: all, or of a model with more parts (one that sees, a projector)
        those of the decoder, the embeddings and the head."""
        whole = text_config(self.model.config) is self.model.config
        root = "" if whole else decoder_of(self.model)
        ends = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        for name, module in self.model.named_modules():
            passed = is_within(name, root) or any(module is end for end in ends)
            if passed and (module._parameters or module._buffers):
                yield name, module

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
            warn_if_lost(name, there, moved)
        return moved

    def _source(self, name: str, like: Tensor) -> Source:
        """(tensor in the files, part of it or None for all): files may hold the experts of a layer in one tensor."""
        stored = self.names.stored(name)
        if stored is None and (fused := fused_source(name, self._projections, like.shape)):
            whole = self.names.stored(fused[0])
            if whole is not None:
                (expert, rows), (height, width) = fused[1], like.shape
                shape = self.store.shape(whole)
                expected = shape[0], height * (1 if rows == slice(None) else 2), width
                return whole, (expert, slice(None), rows) if self.names.is_turned(whole, shape, expected) else fused[1]
        return stored or self._stored_otherwise(name), None

    def _stored_otherwise(self, name: str) -> str:
        """Tied weights stand in the files under one name only."""
        tied = self._tied.get(name.removeprefix(self._above))
        stored = None if tied is None else self.names.stored(tied)
        if stored is not None:
            return stored
        strangers = self.unknown_tensors() or sorted(self.names.converted)
        if strangers:
            raise InputError(
                f"{type(self.model).__name__}: not understood: its files hold {strangers[0]} and no {name}, that is, "
                "they store the model in another form than this version of transformers runs it"
            )
        raise CheckpointError(f"{self.store.directory}: the tensor {name} is missing; fetch the checkpoint again")

    def require_complete(self) -> None:
        """CheckpointError, before any work, for a tensor the architecture needs and the files lack or misshape."""
        for index, block in enumerate(self.blocks):
            for name, tensor in persistent(block):
                self._require_shape(f"{self.block_name(index)}.{name}", tensor)
        for _, _, name, like in self._absent(self._outer):
            self._require_shape(name, like)

    def _require_shape(self, name: str, like: Tensor) -> None:
        stored, part = self._source(name, like)
        shape = list(self.store.shape(stored))
        if part is not None:
            experts, rows, columns = shape
            if part[0] >= experts:
                raise CheckpointError(f"{stored}: holds {experts} experts, config.json names more ({name})")
            if len(part) == 3:
                rows, columns = columns, rows
            shape = [len(range(*part[-1].indices(rows))), columns]
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
