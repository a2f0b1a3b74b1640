"""One token after another: a batch decoded with transformers' caches, each step one CUDA graph where there is a GPU.

A decode step of a quantized model is hundreds of kernels of a few microseconds each; launched one by one from Python
they wait for the host. With a cache of fixed size every step is the same work on the same addresses, so it is
recorded once and replayed with a single launch. The model's own forward is what is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3


class Decoder:
    """Decodes batches of one size with one model.

    model      a transformers causal language model in eval mode, on one device.
    batch      sequences at once, all of one length.
    length     tokens that the cache holds: prompt and new ones.
    graphs     record the step as a CUDA graph; needs CUDA.
    compiled   run the step through torch.compile, which merges the small kernels between the linears. The first step
               then takes a minute.

    Without either the cache is the growing one that `generate` uses; with one of them it has a fixed size. Not every
    model can run so (`why_not`).

    `prefill` starts a batch, `step` appends one token to every sequence. `tokens` int64 [B] is what the next step
    takes: the most likely ones, unless something else is written into it. ValueError for a mode that `why_not` refuses.
    """

    def __init__(self, model: Any, batch: int, length: int, *, graphs: bool = False, compiled: bool = False) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.batch, self.length = batch, length
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.filled = 0
        self._static = graphs or compiled
        if reason := why_not(model, length, graphs=graphs, compiled=compiled):
            raise ValueError(reason)
        self._cache = self._new_cache()
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._forward = torch.compile(self._next, fullgraph=True, dynamic=False) if compiled else self._next
        if graphs:
            self._record()

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Forget everything, read the prompts int64 [B, T] → logits [B, V] of the token after them."""
        if ids.shape[0] != self.batch or not 0 < ids.shape[1] <= self.length:
            raise ValueError(f"ids: got {list(ids.shape)}, expected [{self.batch}, T] with T from 1 to {self.length}")
        if self._static:
            self._cache.reset()
        else:
            self._cache = self._new_cache()
        self.filled = ids.shape[1]
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
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
        if self._graph is not None:
            self._graph.replay()
        else:
            self._advance()
        assert self._logits is not None
        return self._logits

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        if not self._static:
            return DynamicCache(config=self.model.config)
        return _fixed_cache(self.model.config, self.length, self.device)

    def _next(self, tokens: Tensor, cache: Any) -> Tensor:
        return self.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]

    def _advance(self) -> None:
        self._logits = self._forward(self.tokens, self._cache)
        self.tokens.copy_(self._logits.argmax(-1))

    @torch.no_grad()
    def _record(self) -> None:
        # The cache gets its memory from a first prompt; kernels are chosen and compiled outside the recording.
        self.prefill(torch.zeros(self.batch, 1, dtype=torch.int64, device=self.device))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._cache.reset()
                self._advance()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        self._graph = graph


def why_not(model: Any, length: int, *, graphs: bool, compiled: bool) -> str:
    """Why decoding `length` tokens cannot run so; empty if it can."""
    device = next(model.parameters()).device
    if graphs and device.type != "cuda":
        return f"CUDA graphs need a GPU, the model is on {device.type}"
    if (graphs or compiled) and (kinds := _rope_types(model.config) & {"dynamic", "longrope"}):
        return f"the model's rotary embedding (rope_type {min(kinds)}) asks the host for the length at every step"
    if (graphs or compiled) and any(_fixed_cache(model.config, length, device).is_sliding):
        return (
            f"the model's attention window is shorter than {length} tokens: its cache slides, a recorded step does not"
        )
    return ""


def _fixed_cache(config: Any, length: int, device: torch.device) -> Any:
    from marlin_gptq.modeling.fixed_cache import fixed_cache  # imports much of transformers

    return fixed_cache(config, length, device)


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary embedding a config names, for all layers or for each type of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return {str(one["rope_type"]) for one in (settings, *nested) if "rope_type" in one}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those that are shared counted once."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
