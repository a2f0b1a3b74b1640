"""A decoder model streamed through a device: embedding, one block at a time, head.

The model is built without weights; those of a block are read from the checkpoint when the block is entered and let go
when it is left (streamed_weights.py). Masks, positions and rotary embeddings are made by the model's own forward, in
which every block but the one that runs stands aside (asides.py). So no architecture's forward is written down again
here, and memory stays near one block.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from marlin_gptq.checkpoint import TensorStore
from marlin_gptq.config import QuantizationConfig
from marlin_gptq.errors import InputError
from marlin_gptq.kernel import why_not
from marlin_gptq.modeling.architecture import decoder_blocks, quantization_settings, read_config, replace_linears
from marlin_gptq.modeling.asides import Asides
from marlin_gptq.modeling.attention import ANY_LENGTH, REPEATABLE
from marlin_gptq.modeling.block_output import hidden_of
from marlin_gptq.modeling.classes import empty_model, has_language_head, text_config
from marlin_gptq.modeling.linear import MarlinLinear
from marlin_gptq.modeling.names import StoredNames
from marlin_gptq.modeling.packed import PROBE_LENGTHS, joined_arguments, make_of, mistake, packs_of, within_samples
from marlin_gptq.modeling.streamed_weights import StreamedWeights, release, stored_dtype

logger = logging.getLogger(__name__)
_C_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


class BlockStream:
    """Full-precision and quantized checkpoint directories alike, one decoder block on the device at a time.

    device  where blocks run.
    dtype   computing dtype; by default that of the checkpoint on a GPU and float32 elsewhere. Scales of quantized
            layers keep their stored dtype.

    Raises InputError for models that are not understood, CheckpointError for broken or incomplete files.
    """

    def __init__(self, model_dir: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.model_dir = model_dir
        self.device = device
        config = read_config(model_dir)
        self.config = text_config(config)
        self.store = TensorStore(model_dir)
        settings = quantization_settings(config)
        self.quantized = settings is not None
        self.settings = None if settings is None else QuantizationConfig.from_dict(settings)
        self.stored_dtype = stored_dtype(self.store, self.quantized)
        self.dtype = dtype or (self.stored_dtype if device.type == "cuda" else torch.float32)
        if self.quantized and device.type == "cuda" and self.dtype != self.stored_dtype:
            raise InputError(
                f"{model_dir}: its scales are {self.stored_dtype}, which the kernel cannot run in {self.dtype}; "
                f"use --dtype auto"
            )
        self.model = empty_model(config, self.dtype)
        self.model.eval().requires_grad_(False)
        _place(self.model, device)
        self.has_head = has_language_head(config)
        self.prefix, places = decoder_blocks(self.model, config)
        if self.settings is not None:
            replace_linears(self.model, config, self.settings, self.stored_dtype)
        names = StoredNames(self.model, self.store.names)
        self._asides = Asides(self.model, places)
        self._blocks = self._asides.blocks
        # Of blocks tried: what goes wrong when samples share a pass.
        self._mistakes: dict[Hashable, str | None] = {}
        self._told_alone = False
        self.weights = StreamedWeights(self.model, self.prefix, self._blocks, self.store, names, self.settings, device)
        self.weights.require_complete()
        self._move_buffers()
        self._asides.require_plain(torch.empty((), dtype=self.dtype, device=self.device))
        self.release()

    @property
    def n_blocks(self) -> int:
        return len(self._blocks)

    def block_module(self, index: int) -> nn.Module:
        """Block `index` as it stands, without weights outside `block(index)`."""
        return self._blocks[index]

    def block_name(self, index: int) -> str:
        """Full name, for instance `model.layers.0`."""
        return self.weights.block_name(index)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, T] → the input of block 0 [B, T, hidden_size]; outside `block(0)`."""
        self.weights.load_outer(self.model.get_input_embeddings())
        return self._asides.embed(ids.to(self.device))

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Inside: block `index` with its weights on the device, ready for `run`."""
        block = self._blocks[index]
        self.weights.load_block(index)
        layers = [layer for layer in block.modules() if isinstance(layer, MarlinLinear)]
        for layer in layers:
            layer.prepare_for_device()
            layer.hold_dense(not self._kernel_runs())
        self._asides.enter(index)
        try:
            if self._asides.returned is None:
                self._asides.learn(index)
            yield block
        finally:
            self._asides.leave(index)
            for layer in layers:
                layer.hold_dense(False)
                layer.restore_stored_layout()
            release(block)
            return_free_memory()

    def read_ahead(self, index: int) -> None:
        """Begin to read the weights of block `index` into host memory, for when it is entered; `close` ends it."""
        self.weights.read_ahead(index)

    def close(self) -> None:
        """End the thread that reads ahead, if one began."""
        self.weights.close()

    @torch.no_grad()
    def run(self, index: int, hidden: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """hidden [B, T, hidden_size] through block `index`, which must have been entered.

        lengths  of the samples that hidden [1, ΣT, hidden_size] is a pack of, see `packs`; fewer than two are none.
        """
        return self.run_with(index, {}, hidden, lengths)

    def run_with(
        self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, lengths: Sequence[int] = ()
    ) -> Tensor:
        """As `run`, with `tensors`, by their names inside the block, in the place of its own; where gradients are
        enabled they go to these and to `hidden`, which may be of another dtype than the stream's."""
        block = self._blocks[index]
        if not self._asides.entered(index):
            raise RuntimeError(f"block {index} is not loaded: call run inside `with stream.block({index})`")
        with torch.autocast(self.device.type, enabled=False):  # what is remembered is the same whoever asks first
            like = hidden.detach() if hidden.dtype == self.dtype else self._like(hidden.shape)
            if len(lengths) < 2:
                args, kwargs = self._asides.arguments(index, like)
            else:
                parts = like.split(list(lengths), dim=1)
                args, kwargs = joined_arguments([self._asides.arguments(index, part) for part in parts])
        attention = within_samples(block, lengths) if len(lengths) > 1 else nullcontext()
        with sdpa_kernel(REPEATABLE if torch.is_grad_enabled() else ANY_LENGTH), attention:
            if tensors:
                output = torch.func.functional_call(block, dict(tensors), (hidden, *args), kwargs)
            else:
                output = block(hidden, *args, **kwargs)
        return hidden_of(output)

    @torch.no_grad()
    def packs(self, index: int, shapes: Sequence[tuple[int, int]], tokens: int) -> list[range]:
        """Positions of the samples, of (B, T) each, that may pass block `index` together; it must have been entered.

        tokens  of a pack at most, unless one sample has more; 0 leaves every sample alone.

        Alone stay batches, samples that the model hands a mask or anything else that is not understood, and all samples
        where a trial finds a mistake; the log says so, once. To be called where nothing watches the block's linears:
        the trial passes NaN through them.
        """
        alone = [range(position, position + 1) for position in range(len(shapes))]
        if tokens <= 0 or len(shapes) < 2:
            return alone
        kinds = [self._kind(index, length) if batch == 1 else None for batch, length in shapes]
        packs = packs_of([batch * length for batch, length in shapes], kinds, tokens)
        wrong = self._mistake(index) if len(packs) < len(shapes) else None
        lonely = [length for (batch, length), kind in zip(shapes, kinds, strict=True) if batch == 1 and kind is None]
        if wrong is not None:
            self._tell_alone(index, wrong)
        elif lonely:
            self._tell_alone(index, f"samples of {min(lonely)} tokens come with a mask or the like (a sliding window?)")
        return packs if wrong is None else alone

    def _tell_alone(self, index: int, reason: str) -> None:
        if not self._told_alone:
            self._told_alone = True
            logger.warning(
                "%s: %s; calibration samples that cannot share a pass go through one at a time, which takes longer",
                self.block_name(index),
                reason,
            )

    def _kind(self, index: int, length: int) -> Hashable | None:
        return self._asides.kind(index, self._like((1, length, self.config.hidden_size)))

    def _like(self, shape: Sequence[int]) -> Tensor:
        """Hidden states of this shape that take no memory, for what does not depend on their values."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(*shape)

    def _mistake(self, index: int) -> str | None:
        """What goes wrong when samples share a pass through block `index`; tried once for all blocks of its make."""
        kinds = {self._kind(index, length) for length in PROBE_LENGTHS}
        if len(kinds) > 1 or None in kinds:
            return "what the model hands it beside hidden states is not understood"
        make = make_of(self._blocks[index]), kinds.pop()
        if make not in self._mistakes:
            self._mistakes[make] = mistake(
                lambda hidden, lengths: self.run(index, hidden.to(self.device), lengths),
                self.config.hidden_size,
                self.dtype,
            )
        return self._mistakes[make]

    def head(self, hidden: Tensor) -> Tensor:
        """The last block's output [B, T, hidden_size] → logits [B, T, vocab_size]: final norm and output head.

        Gradients go to `hidden` if it asks for them. InputError for a model without a language model's head."""
        if not self.has_head:
            raise InputError(
                f"{self.model_dir}: holds a {type(self.model).__name__}, which gives no logits of the next token; what "
                "is measured or tuned by them needs a model with a language model's head (…ForCausalLM)"
            )
        self.weights.load_outer(self.model.get_output_embeddings())
        with self._leaving(hidden) as embedded:
            return self.model(inputs_embeds=embedded, use_cache=False).logits

    @torch.no_grad()
    def final(self, hidden: Tensor) -> Tensor:
        """The last block's output [B, T, hidden_size] → what the output head sees: the final norm, no logits."""
        with self._leaving(hidden) as embedded:
            return self.model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state

    @contextmanager
    def _leaving(self, hidden: Tensor) -> Iterator[Tensor]:
        if self._asides.returned is None:
            with self.block(0):
                pass  # what blocks return is known now
        with self._asides.leaving(hidden) as embedded:
            yield embedded

    def release(self) -> None:
        """Let the weights outside the blocks go; `embed` and `head` read them again when called."""
        self.weights.release_outer()

    def kernel_name(self) -> str:
        """What computes the quantized linears here, for reports."""
        if not self.quantized:
            return "full precision (no quantized layers)"
        if self._kernel_runs():
            major, minor = torch.cuda.get_device_capability(self.device)
            return f"CUDA kernel (sm_{major}{minor}, {torch.cuda.get_device_name(self.device)})"
        if self.device.type != "cuda":
            return f"reference path in plain torch (device {self.device.type})"
        return f"reference path in plain torch ({why_not(self._gpu_index())})"

    def _kernel_runs(self) -> bool:
        return self.device.type == "cuda" and not why_not(self._gpu_index())

    def _gpu_index(self) -> int:
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def _move_buffers(self) -> None:
        """Rotary tables and the like, which no file holds, to the device."""
        holders = [self.model, *self._blocks]
        for root in holders:
            for module in root.modules():
                for own, buffer in module.named_buffers(recurse=False):
                    if not buffer.is_meta:
                        module._buffers[own] = buffer.to(self.device)


def _place(model: nn.Module, device: torch.device) -> None:
    """Tell the parts of a model that ask for their device what it is: weights come and go, and parts that text does not
    pass never have any."""
    from transformers import PreTrainedModel

    for part in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        kind = type(part)
        part.__class__ = type(kind.__name__, (kind,), {"device": device, "__module__": kind.__module__})


def return_free_memory() -> None:
    """Give freed host memory back to the system: glibc keeps what lies between live allocations, and a little more of
    it stays with every block (peak memory 218 MB higher for 20 more blocks of 8 MB, 5 to 57 MB with this)."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
