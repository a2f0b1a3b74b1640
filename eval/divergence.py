"""How far a model's next-token distributions lie from a baseline's, beside both perplexities.

KL(baseline ‖ model) = Σ p · (log p − log q), in nats, over every position of every window (no label is needed, so
the last position counts too), and the share of positions where both put the same token first. Neighbouring tokens
are not independent, so standard errors take a window as the unit: that of a ratio estimate (Cochran, *Sampling
Techniques*, 1977, ch. 6). On small models divergence tells recipes apart where perplexity, which can fall by chance,
does not.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_gptq.eval.hidden_states import HiddenStates, Progress, Steps, last_hidden
from marlin_gptq.eval.perplexity import (
    LOGITS_PER_CHUNK,
    PerplexityResult,
    Prepared,
    prepare,
    require_batch_size,
    require_finite_head,
    stream_nll,
)


@dataclass(frozen=True)
class Divergence:
    """Of a model from its baseline; standard errors over windows, None where there is one window only."""

    kl_nats: float
    kl_nats_standard_error: float | None
    top1_agreement_percent: float
    top1_agreement_percent_standard_error: float | None
    tokens: int
    windows: int
    protocol: str = (
        "mean over all positions of KL(baseline || model) of the next-token distributions, float32 per position; "
        "standard errors with the window as unit"
    )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Both perplexities, and the divergence or, in one sentence, why there is none."""

    model: PerplexityResult
    baseline: PerplexityResult
    divergence: Divergence | None
    missing: str | None = None


def compare_models(
    model_dir: Path,
    baseline_dir: Path,
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
    divergence: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Perplexity of both model directories and the divergence of the first; arguments as in `evaluate_perplexity`.

    divergence  False leaves it out, which saves its time and the memory of a second set of hidden states.
    """
    require_batch_size(batch_size)
    one, other = (
        prepare(
            directory, dataset, seq_len,
            device=device, dtype=dtype, n_samples=n_samples, seed=seed, limit=limit, offline=offline,
        )
        for directory in (model_dir, baseline_dir)
    )  # fmt: skip
    missing = _why_not(one, other)
    if missing is None and divergence:
        return _together(one, other, batch_size, progress)
    totals = [len(part.batches(batch_size)) * (part.stream.n_blocks + 2) for part in (one, other)]
    results = []
    for part, before in ((one, 0), (other, totals[0])):
        started = time.perf_counter()
        nll = stream_nll(
            part.stream, part.windows, batch_size=batch_size, progress=_shifted(progress, before, sum(totals))
        )
        results.append(part.result(nll, time.perf_counter() - started))
    return Comparison(results[0], results[1], None, missing)


def _why_not(one: Prepared, other: Prepared) -> str | None:
    sizes = one.stream.config.vocab_size, other.stream.config.vocab_size
    if sizes[0] != sizes[1]:
        return f"the vocabularies have {sizes[0]} and {sizes[1]} tokens, so the distributions cannot be compared"
    if len(one.windows) != len(other.windows) or not all(map(torch.equal, one.windows, other.windows)):
        return "the models tokenize this text differently, so neither perplexity nor divergence is comparable"
    return None


@torch.no_grad()
def _together(one: Prepared, other: Prepared, batch_size: int | None, progress: Progress | None) -> Comparison:
    batches = one.batches(batch_size)
    steps = Steps(progress, len(batches) * (one.stream.n_blocks + other.stream.n_blocks + 3))
    models = []
    for prepared, share in ((one, 0.3), (other, 0.4)):
        started = _now(prepared.stream.device)
        hidden = last_hidden(prepared.stream, batches, share, steps)
        models.append(_Head(prepared, hidden, _now(prepared.stream.device) - started))
    sums = _Sums()
    for position, ids in enumerate(batches):
        _score(models[0], models[1], position, ids, sums)
        steps.step()
    for head in models:
        require_finite_head(head.nll, head.prepared.stream.dtype)
    results = [head.prepared.result(float(head.nll), head.seconds) for head in models]
    return Comparison(results[0], results[1], sums.divergence())


class _Head:
    """The output head of one model: log-probabilities, and the NLL and seconds that have added up."""

    def __init__(self, prepared: Prepared, hidden: HiddenStates, seconds: float) -> None:
        self.prepared, self.hidden, self.seconds = prepared, hidden, seconds
        self.nll = torch.zeros((), dtype=torch.float64, device=prepared.stream.device)

    def log_probabilities(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """hidden [B, t, hidden_size] → float32 [B, t, vocab]; scores the labels int64 [B, t or t − 1]."""
        started = _now(hidden.device)
        logs = torch.log_softmax(self.prepared.stream.head(hidden).float(), dim=-1)
        self.nll -= logs[:, : labels.shape[1]].gather(-1, labels[..., None]).double().sum()
        self.seconds += _now(hidden.device) - started
        return logs


class _Sums:
    """Sums of each window, float64 [B] per batch."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []
        self.lengths: list[int] = []

    def divergence(self) -> Divergence:
        kl, same = torch.cat(self.kl), torch.cat(self.same)
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        mean, error = ratio(kl, lengths)
        share, share_error = ratio(same, lengths)
        return Divergence(
            kl_nats=mean,
            kl_nats_standard_error=error,
            top1_agreement_percent=100 * share,
            top1_agreement_percent_standard_error=None if share_error is None else 100 * share_error,
            tokens=int(lengths.sum()),
            windows=len(lengths),
        )


def ratio(sums: Tensor, sizes: Tensor) -> tuple[float, float | None]:
    """Σ sums / Σ sizes of float64 [n] clusters, and its standard error with the cluster as unit (None for n = 1)."""
    mean = sums.sum() / sizes.sum()
    count = len(sums)
    if count < 2:
        return float(mean), None
    squares = (sums - mean * sizes).square().sum()
    return float(mean), math.sqrt(float(squares) * count / (count - 1)) / float(sizes.sum())


def _score(model: _Head, baseline: _Head, position: int, ids: Tensor, sums: _Sums) -> None:
    """Both heads over batch `position`, some positions at a time, so that logits stay small."""
    stream = model.prepared.stream
    batch, length = ids.shape
    ids = ids.to(stream.device)
    ours, theirs = model.hidden.get(position), baseline.hidden.get(position)
    step = max(1, LOGITS_PER_CHUNK.get(stream.device.type, 2**22) // (2 * batch * stream.config.vocab_size))
    kl = torch.zeros(batch, dtype=torch.float64, device=stream.device)
    same = torch.zeros_like(kl)
    for start in range(0, length, step):
        labels = ids[:, start + 1 : start + step + 1]
        q = model.log_probabilities(ours[:, start : start + step], labels)
        p = baseline.log_probabilities(theirs[:, start : start + step], labels)
        first = p.argmax(-1, keepdim=True)
        same += (q.gather(-1, first) == q.amax(-1, keepdim=True)).double().sum((1, 2))
        kl += kl_per_token_(p, q).double().sum(1)
    sums.kl.append(kl.cpu())
    sums.same.append(same.cpu())
    sums.lengths += [length] * batch


def kl_per_token_(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats of log-probabilities [..., vocab] → [...]. Overwrites both: they are large."""
    torch.sub(p, q, out=q)
    return torch.linalg.vecdot(p.exp_(), q)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)
