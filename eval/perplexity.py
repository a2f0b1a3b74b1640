"""Token perplexity as the GPTQ papers measure it, streamed block by block.

Protocol (Frantar et al., "GPTQ", 2022): the whole text is tokenized once and cut into windows of `seq_len`
tokens that do not overlap; the tail that fills none is dropped; the first token of a window is not scored;
perplexity is exp of the mean negative log-likelihood per scored token. Datasets of documents are cut document
by document into windows of at most `seq_len`, and every token counts the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.calibration import load_tokenizer, sequence_length
from marlin_gptq.errors import InputError, QuantizationError
from marlin_gptq.eval.windows import equal_length_batches, require_vocabulary, text_windows
from marlin_gptq.modeling.blocks import BlockStream

LOGITS_PER_CHUNK = {"cuda": 2**25, "cpu": 2**22}
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 4096}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity = exp(nll); nll in nats per scored token; `tokens` are the scored ones."""

    perplexity: float
    nll: float
    tokens: int
    windows: int
    seq_len: int
    seconds: float
    tokens_per_second: float
    kernel: str
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_perplexity(
    model_dir: Path,
    dataset: str,
    seq_len: int | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    n_samples: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a model directory, full-precision or quantized, on a dataset (see `load_documents`).

    seq_len     tokens per window; by default 4096, or the model's context if that is shorter.
    batch_size  windows per forward; by default as many as hold 16384 tokens on a GPU, 4096 elsewhere.
    n_samples   documents taken, shuffled by `seed`; by default all of a local dataset, 256 of a streamed one.
    limit       only the first windows, for tests: the figure is then not comparable with any other.
    progress    called with (done, total) steps.

    Raises InputError, CheckpointError, and QuantizationError for activations or logits that are NaN or Inf.
    """
    for name, number in (("batch_size", batch_size), ("n_samples", n_samples), ("limit", limit)):
        if number is not None and number < 1:
            raise InputError(f"{name}: got {number}, expected at least 1")
    stream = BlockStream(model_dir, device=device, dtype=dtype)
    seq_len = sequence_length(seq_len, getattr(stream.config, "max_position_embeddings", None))
    windows, protocol = text_windows(
        load_tokenizer(model_dir), dataset, seq_len, n_samples=n_samples, seed=seed, offline=offline
    )
    if limit is not None and limit < len(windows):
        windows = windows[:limit]
        protocol += f"; LIMITED to the first {limit} windows, for tests only"
    require_vocabulary(windows, stream.config.vocab_size)

    started = time.perf_counter()
    total_nll = stream_nll(stream, windows, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - started
    tokens = sum(len(window) - 1 for window in windows)
    nll = total_nll / tokens
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        tokens=tokens,
        windows=len(windows),
        seq_len=seq_len,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        kernel=stream.kernel_name(),
        protocol=protocol,
    )


@torch.no_grad()
def stream_nll(
    stream: BlockStream,
    windows: list[Tensor],
    *,
    batch_size: int | None = None,
    memory_share: float = 0.4,
    progress: Progress | None = None,
) -> float:
    """Summed negative log-likelihood in nats of all tokens but the first of each window.

    Per token in float32, summed in float64. Every block is loaded once. The hidden states of all windows stay
    on the device if they fit into `memory_share` of its free memory, else in page-locked host memory.
    """
    batches = equal_length_batches(windows, batch_size, TOKENS_PER_BATCH.get(stream.device.type, 4096))
    tell = _Steps(progress, len(batches) * (stream.n_blocks + 2))
    hidden = _Hidden(stream, sum(len(window) for window in windows), memory_share)
    for batch in batches:
        hidden.append(stream.embed(batch.to(stream.device)))
        tell.step()
    for index in range(stream.n_blocks):
        finite = torch.ones((), dtype=torch.bool, device=stream.device)
        with stream.block(index):
            for position in range(len(batches)):
                output = stream.run(index, hidden.get(position))
                finite &= torch.isfinite(output).all()
                hidden.put(position, output)
                tell.step()
        if not finite:
            raise QuantizationError(
                f"decoder block {index}: its output holds NaN or Inf computed in {_name(stream.dtype)}; "
                "try --dtype bfloat16 or float32, and check the checkpoint"
            )
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for position, batch in enumerate(batches):
        total += _head_nll(stream, hidden.get(position), batch.to(stream.device))
        tell.step()
    if not torch.isfinite(total):
        raise QuantizationError(
            f"output head: its logits hold NaN or Inf computed in {_name(stream.dtype)}; "
            "try --dtype bfloat16 or float32, and check the checkpoint"
        )
    return float(total)


def _head_nll(stream: BlockStream, hidden: Tensor, ids: Tensor) -> Tensor:
    """float64 []: summed over [B, T] tokens, some positions at a time, so that logits stay small."""
    batch, length = ids.shape
    chunk = LOGITS_PER_CHUNK.get(stream.device.type, 2**22)
    step = max(1, chunk // (batch * stream.config.vocab_size))
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        logits = stream.head(hidden[:, start:stop]).float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, start + 1 : stop + 1].flatten(), reduction="none"
        )
        total += losses.double().sum()
    return total


class _Hidden:
    """Hidden states of all batches, on the device or in page-locked host memory (pageable copies crawl)."""

    def __init__(self, stream: BlockStream, tokens: int, memory_share: float) -> None:
        self.device = stream.device
        self.batches: list[Tensor] = []
        self.on_device = True
        if self.device.type == "cuda":
            size = tokens * stream.config.hidden_size * stream.dtype.itemsize
            free, _ = torch.cuda.mem_get_info(self.device)
            self.on_device = size <= memory_share * free

    def append(self, hidden: Tensor) -> None:
        if self.on_device:
            self.batches.append(hidden)
        else:
            self.batches.append(torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden))

    def get(self, position: int) -> Tensor:
        return self.batches[position].to(self.device, non_blocking=True)

    def put(self, position: int, hidden: Tensor) -> None:
        if self.on_device:
            self.batches[position] = hidden
        else:
            self.batches[position].copy_(hidden)


class _Steps:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
