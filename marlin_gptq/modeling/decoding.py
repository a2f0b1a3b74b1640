"""One token after another: a batch decoded with a cache, each step one CUDA graph where there is a GPU.

A decode step of a quantized model is hundreds of kernels of a few microseconds each; launched one by one from Python
they wait for the host. With a cache of fixed size every step is the same work on the same addresses, so it is
recorded once and replayed with a single launch. The model's own forward is what is recorded, but for the attention of
heads that share keys and values (attention.py).

A cache of fixed size is read whole, filled or not. Where that is much, the step is recorded for a quarter of it, for a
half and so on, and the shortest record that holds what is filled is replayed:

    filled   1 … L/4   … L/2   … 3L/4   … L
    reads      L/4      L/2      3L/4     L       62 % of a cache that fills up
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from marlin_gptq.modeling.attention import ANY_LENGTH, grouped_queries, sdpa_configs
from marlin_gptq.modeling.experts import Experts

WARM_UP_STEPS = 3
# What models call the cache that they take and return.
_CACHES = ("past_key_values", "cache_params")
# Tokens that a cache holds at least, of all sequences together, for more than one record; parts of it, and what they
# are multiples of.
_MUCH, _PARTS, _PART_OF = 1 << 16, 4, 64


class Decoder:
    """Decodes batches of one size with one model.

    model      a transformers causal language model in eval mode, on one device.
    batch      sequences at once, all of one length.
    length     tokens that the cache holds: prompt and new ones.
    graphs     record the step as a CUDA graph; needs CUDA.
    compiled   run the step through torch.compile, which merges the small kernels between the linears. The first step
               then takes a minute.
    fixed      a cache of fixed size, as the two need it; True without them: what is recorded, step by step.

    Otherwise the cache is the one that the model makes for itself: keys and values that grow, and what else it keeps of
    the text (states of linear attention, convolutions). Not every model can run on one of fixed size (`why_not`).

    `prefill` starts a batch, `step` appends one token to every sequence. `tokens` int64 [B] is what the next step
    takes: the most likely ones, unless something else is written into it. ValueError for a mode that `why_not` refuses.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        *,
        graphs: bool = False,
        compiled: bool = False,
        fixed: bool = False,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.batch, self.length = batch, length
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.filled = 0
        self._fixed = graphs or compiled or fixed
        if reason := why_not(model, length, graphs=graphs, compiled=compiled, fixed=fixed):
            raise ValueError(reason)
        self._cache: Any = _fixed_cache(model.config, length, self.device) if self._fixed else None
        self._kept: dict[str, Any] = {}  # the model's own cache, by the name it has for it
        self._takes = inspect.signature(model.forward).parameters
        # Of models that look another attention up than their own.
        self._configs = sdpa_configs(model) if getattr(model, "_supports_attention_backend", False) else []
        self._logits: Tensor | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._compiled = torch.compile(self._next, fullgraph=True, dynamic=False) if compiled else None
        # Each would be compiled for itself.
        self._ends = ends(batch, length) if self._fixed and not compiled and self._can_hide() else (length,)
        if graphs:
            self._record()

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Forget everything, read the prompts int64 [B, T] → logits [B, V] of the token after them."""
        if ids.shape[0] != self.batch or not 0 < ids.shape[1] <= self.length:
            raise ValueError(f"ids: got {list(ids.shape)}, expected [{self.batch}, T] with T from 1 to {self.length}")
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        self.filled = ids.shape[1]
        with self._attention():
            if self._fixed:
                self._cache.reset()
                self._show(self.filled)
                output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **only_last)
            else:
                self._kept = {}
                output = self._go_on(ids, **only_last)
        logits = output.logits[:, -1]
        self.tokens.copy_(logits.argmax(-1))
        return logits

    @torch.no_grad()
    def step(self) -> Tensor:
        """Append `tokens` to the sequences → logits [B, V] of what follows; `tokens` is the most likely of it.

        With graphs the logits are the same memory at every step. RuntimeError if the cache is full.
        """
        if self.filled >= self.length:
            raise RuntimeError(f"the cache holds {self.length} tokens and is full")
        self.filled += 1
        end = next(end for end in self._ends if end >= self.filled)
        if self._graphs:
            self._graphs[end].replay()
        else:
            self._show(end)
            with self._attention():
                self._advance()
        assert self._logits is not None
        return self._logits

    def _go_on(self, ids: Tensor, **options: Any) -> Any:
        """The model's output for the last `ids` of the `filled` tokens, with the cache that it makes for itself."""
        positions = torch.arange(self.filled - ids.shape[1], self.filled, device=self.device)
        if "cache_position" in self._takes:
            options["cache_position"] = positions
        if "position_ids" in self._takes:  # some models count what their first layer keeps, which may be nothing
            options["position_ids"] = positions.expand(len(ids), -1)
        output = self.model(input_ids=ids, use_cache=True, **self._kept, **options)
        self._kept = {name: output[name] for name in _CACHES if output.get(name) is not None} or self._kept
        if self._kept:
            return output
        from transformers import DynamicCache

        self._kept = {_CACHES[0]: DynamicCache(config=self.model.config)}  # one that it writes into and does not return
        return self._go_on(ids, **options)

    def _can_hide(self) -> bool:
        from marlin_gptq.modeling.fixed_cache import can_hide

        return can_hide(self._cache)

    def _show(self, count: int) -> None:
        if self._fixed:
            from marlin_gptq.modeling.fixed_cache import show

            show(self._cache, count)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        # With a growing cache every step has a length of its own.
        with grouped_queries(self._configs) if self._fixed else sdpa_kernel(ANY_LENGTH):
            yield

    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        if not self._fixed:
            return self._go_on(tokens[:, None]).logits[:, -1]
        return self.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]

    def _advance(self) -> None:
        forward = self._compiled or self._next  # an attribute of its own would keep the cache alive in a circle
        self._logits = forward(self.tokens, self._cache)
        self.tokens.copy_(self._logits.argmax(-1))

    @torch.no_grad()
    def _record(self) -> None:
        # The cache gets its memory from a first prompt; kernels are chosen and compiled outside the recording.
        self.prefill(torch.zeros(self.batch, 1, dtype=torch.int64, device=self.device))
        pool = torch.cuda.graph_pool_handle()  # of all records: only one runs at a time
        recorded: dict[int, torch.cuda.CUDAGraph] = {}
        logits: Tensor | None = None  # those of the first record, where the others put theirs too
        for end in reversed(self._ends):
            self._show(end)
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream), self._attention():
                for _ in range(WARM_UP_STEPS):
                    self._cache.reset()
                    self._advance()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            self._cache.reset()
            recorded[end] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded[end], pool=pool), self._attention():
                self._advance()
                assert self._logits is not None
                if logits is None:
                    logits = self._logits
                else:
                    logits.copy_(self._logits)
        self._logits, self._graphs = logits, recorded


def ends(batch: int, length: int) -> tuple[int, ...]:
    """Parts of a cache of `length` places for each of `batch` sequences that steps are recorded for, shortest first."""
    if batch * length < _MUCH:
        return (length,)
    parts = (_PART_OF * math.ceil(length * part / _PARTS / _PART_OF) for part in range(1, _PARTS + 1))
    return tuple(sorted({min(length, part) for part in parts}))


def why_not(model: Any, length: int, *, graphs: bool, compiled: bool, fixed: bool = False) -> str:
    """Why decoding `length` tokens cannot run so; empty if it can."""
    device = next(model.parameters()).device
    fixed = graphs or compiled or fixed
    if graphs and device.type != "cuda":
        return f"CUDA graphs need a GPU, the model is on {device.type}"
    if fixed and (kinds := _rope_types(model.config) & {"dynamic", "longrope"}):
        return f"the model's rotary embedding (rope_type {min(kinds)}) asks the host for the length at every step"
    if fixed and not getattr(model, "_can_compile_fullgraph", True):
        return f"{type(model).__name__} does not run on a cache of fixed size"
    if (graphs or compiled) and any(isinstance(module, Experts) for module in model.modules()):
        return "the host is asked at every step which experts the tokens go to"
    cache = _fixed_cache(model.config, length, device) if fixed else None
    if cache is not None and any(cache.is_sliding):
        return (
            f"the model's attention window is shorter than {length} tokens: its cache slides, a recorded step does not"
        )
    if cache is not None and not _keys_alone(cache):
        return "the model keeps more of the text than keys and values, which a recorded step does not"
    return ""


def _fixed_cache(config: Any, length: int, device: torch.device) -> Any:
    from marlin_gptq.modeling.fixed_cache import fixed_cache  # imports much of transformers

    return fixed_cache(config, length, device)


def _keys_alone(cache: Any) -> bool:
    from marlin_gptq.modeling.fixed_cache import keys_alone

    return keys_alone(cache)


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding a config names, for all layers or for each type of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return {str(one["rope_type"]) for one in (settings, *nested) if "rope_type" in one}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those that are shared counted once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
