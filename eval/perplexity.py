"""Token perplexity as the GPTQ papers measure it, streamed block by block.

Protocol (Frantar et al., "GPTQ", 2022): the whole text is tokenized once and cut into windows of `seq_len`
tokens that do not overlap; the tail that fills none is dropped; the first token of a window is not scored;
perplexity is exp of the mean negative log-likelihood per scored token. Datasets of documents are cut document
by document into windows of at most `seq_len`, and every token counts the same.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.calibration import load_tokenizer, sequence_length
from marlin_gptq.errors import InputError
from marlin_gptq.eval.hidden_states import Progress, Steps, last_hidden, not_finite
from marlin_gptq.eval.windows import equal_length_batches, require_vocabulary, text_windows
from marlin_gptq.modeling.architecture import context_length
from marlin_gptq.modeling.blocks import BlockStream

LOGITS_PER_CHUNK = {"cuda": 2**25, "cpu": 2**22}
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 4096}


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


@dataclass(frozen=True)
class Prepared:
    """A model and the windows [T] it is to score."""

    stream: BlockStream
    windows: list[Tensor]
    seq_len: int
    protocol: str

    def batches(self, batch_size: int | None) -> list[Tensor]:
        """The windows as int64 [B, T], longest first."""
        return equal_length_batches(self.windows, batch_size, TOKENS_PER_BATCH.get(self.stream.device.type, 4096))

    def result(self, total_nll: float, seconds: float) -> PerplexityResult:
        """The figures, from the summed negative log-likelihood in nats."""
        tokens = sum(len(window) - 1 for window in self.windows)
        nll = total_nll / tokens
        return PerplexityResult(
            perplexity=math.exp(nll) if nll < 700 else math.inf,
            nll=nll,
            tokens=tokens,
            windows=len(self.windows),
            seq_len=self.seq_len,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            kernel=self.stream.kernel_name(),
            protocol=self.protocol,
        )


def prepare(
    model_dir: Path,
    dataset: str,
    seq_len: int | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    n_samples: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    offline: bool = False,
) -> Prepared:
    """Open a model directory and cut a dataset into windows for it; arguments as in `evaluate_perplexity`."""
    for name, number in (("n_samples", n_samples), ("limit", limit)):
        if number is not None and number < 1:
            raise InputError(f"{name}: got {number}, expected at least 1")
    stream = BlockStream(model_dir, device=device, dtype=dtype)
    seq_len = sequence_length(seq_len, context_length(stream.config))
    windows, protocol = text_windows(
        load_tokenizer(model_dir), dataset, seq_len, n_samples=n_samples, seed=seed, offline=offline
    )
    if limit is not None and limit < len(windows):
        windows = windows[:limit]
        protocol += f"; LIMITED to the first {limit} windows, for tests only"
    require_vocabulary(windows, stream.config.vocab_size)
    return Prepared(stream, windows, seq_len, protocol)


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
    require_batch_size(batch_size)
    prepared = prepare(
        model_dir, dataset, seq_len,
        device=device, dtype=dtype, n_samples=n_samples, seed=seed, limit=limit, offline=offline,
    )  # fmt: skip
    started = time.perf_counter()
    total_nll = stream_nll(prepared.stream, prepared.windows, batch_size=batch_size, progress=progress)
    return prepared.result(total_nll, time.perf_counter() - started)


def require_batch_size(batch_size: int | None) -> None:
    """InputError for less than 1."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size: got {batch_size}, expected at least 1")


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
    steps = Steps(progress, len(batches) * (stream.n_blocks + 2))
    hidden = last_hidden(stream, batches, memory_share, steps)
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for position, batch in enumerate(batches):
        total += _head_nll(stream, hidden.get(position), batch.to(stream.device))
        steps.step()
    require_finite_head(total, stream.dtype)
    return float(total)


def require_finite_head(total: Tensor, dtype: torch.dtype) -> None:
    """QuantizationError for a summed NLL that is not finite."""
    if not torch.isfinite(total):
        raise not_finite("output head: its logits hold", dtype)


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
