"""How fast a model reads a prompt and writes tokens, alike for full-precision and quantized models.

One request of `batch` sequences, random tokens: the prompt in one forward (its time is the time to first token), then
`new_tokens` − 1 decode steps of one token each, greedy. Both parts end when the device has finished. Figures are
medians over `repeats` requests after one that is not counted.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from marlin_gptq.errors import InputError
from marlin_gptq.modeling.architecture import context_length
from marlin_gptq.modeling.decoding import Decoder, weight_bytes, why_not
from marlin_gptq.modeling.linear import MarlinLinear

# What runs the decode steps. Prompts always run step by step from Python: they are large enough to hide it.
MODES = {
    "eager": {"graphs": False, "compiled": False},
    "graphs": {"graphs": True, "compiled": False},
    "compile": {"graphs": False, "compiled": True},
    "compile+graphs": {"graphs": True, "compiled": True},
}

MEANINGS = {
    "eager": "kernels launched from Python, growing cache",
    "graphs": "fixed cache, each decode step one CUDA graph",
    "compile": "fixed cache, decode step through torch.compile",
    "compile+graphs": "fixed cache, decode step through torch.compile, then one CUDA graph",
}


@dataclass(frozen=True)
class Request:
    """What is asked of a model: `batch` sequences of `prompt` tokens, and `new_tokens` more of each."""

    batch: int
    prompt: int
    new_tokens: int

    @property
    def length(self) -> int:
        return self.prompt + self.new_tokens


@dataclass(frozen=True)
class Speed:
    """One request in one mode. Times in seconds, rates in tokens of all sequences together per second.

    peak_memory: bytes that torch held at once on the GPU, weights included; 0 elsewhere. error: why there are no
    figures (they are 0 then).
    """

    mode: str
    batch: int
    time_to_first_token: float = 0.0
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    decode_step_seconds: float = 0.0
    peak_memory: int = 0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_room(config: Any, requests: list[Request], name: str) -> None:
    """InputError if a request is longer than the model's context, or does not decode at all."""
    context = context_length(config)
    for request in requests:
        if request.new_tokens < 2:
            raise InputError(
                f"new_tokens: got {request.new_tokens}, expected at least 2 (the first comes from the prompt)"
            )
        if context is not None and request.length > context:
            raise InputError(
                f"{name}: {request.prompt} prompt and {request.new_tokens} new tokens are {request.length}, the "
                f"model's context (max_position_embeddings) holds {context}; use a smaller --prompt or --new-tokens"
            )


def measure(
    model: Any,
    requests: list[Request],
    modes: list[str],
    *,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Iterator[Speed]:
    """A Speed for every mode and request, in the order given; `progress` is called after each timed request.

    A request that does not fit into the memory, and a mode that cannot run here, give a Speed with an `error`; the
    others go on.
    """
    for mode in modes:
        for request in requests:
            yield _measure_one(model, request, mode, repeats, seed, progress or (lambda: None))
            _free(model)


def _measure_one(
    model: Any, request: Request, mode: str, repeats: int, seed: int, progress: Callable[[], None]
) -> Speed:
    if reason := why_not(model, request.length, **MODES[mode]):
        return Speed(mode, request.batch, error=reason)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        decoder = Decoder(model, request.batch, request.length, **MODES[mode])
        return time_requests(decoder, request, mode, repeats=repeats, seed=seed, progress=progress)
    except RuntimeError as error:
        if isinstance(error, TorchDynamoException) and not _out_of_memory(error):
            said = str(error).strip().split("\n")[0]
            return Speed(mode, request.batch, error=f"torch.compile failed: {said}")
        if not _out_of_memory(error):
            raise
    except MemoryError:
        pass
    return Speed(mode, request.batch, error=f"out of memory at batch {request.batch}")


def time_requests(
    decoder: Decoder, request: Request, mode: str, *, repeats: int, seed: int, progress: Callable[[], None]
) -> Speed:
    """The Speed of a request that `decoder` was made for; `mode` is only noted."""
    device = decoder.device
    generator = torch.Generator().manual_seed(seed)
    shape = (request.batch, request.prompt)
    ids = torch.randint(0, decoder.model.config.get_text_config().vocab_size, shape, generator=generator).to(device)
    first, steps = [], []
    for repeat in range(repeats + 1):
        seconds = _request(decoder, ids, request.new_tokens)
        if repeat:
            first.append(seconds[0])
            steps.append(seconds[1])
        progress()
    prefill, decode = statistics.median(first), statistics.median(steps)
    made = request.new_tokens - 1
    return Speed(
        mode=mode,
        batch=request.batch,
        time_to_first_token=prefill,
        prefill_tokens_per_second=request.batch * request.prompt / prefill,
        decode_tokens_per_second=request.batch * made / decode,
        decode_step_seconds=decode / made,
        peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
    )


def _out_of_memory(error: RuntimeError) -> bool:
    """Also a host that has no more memory, and a GPU that runs out of it outside torch's own allocator."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "can't allocate memory" in said


def _request(decoder: Decoder, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, seconds for the others)."""
    started = _clock(decoder.device)
    decoder.prefill(ids)
    middle = _clock(decoder.device)
    for _ in range(new_tokens - 1):
        decoder.step()
    return middle - started, _clock(decoder.device) - middle


def memory(model: nn.Module) -> dict[str, int]:
    """Bytes of all weights, and of the linears inside the decoder blocks alone (with their scales, without biases)."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = 0
    for module in model.modules():
        if isinstance(module, MarlinLinear):
            linears += sum(buffer.nbytes for name, buffer in module.named_buffers() if name != "bias")
        elif isinstance(module, nn.Linear) and module is not head:
            linears += module.weight.nbytes
    return {"weights": weight_bytes(model), "linears": linears}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free(model: Any) -> None:
    torch.compiler.reset()
    gc.collect()
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.empty_cache()
