"""The Hessian of a linear's squared output error: accumulate, damp, factor.

For a linear with weight W and inputs x the error of a quantized Q is tr((W−Q)·H·(W−Q)ᵀ) with H = Σ 2·x·xᵀ / tokens
(Frantar et al., "GPTQ", arXiv 2210.17323). All of it is float32 and runs on the device of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DAMP_PERCENT = 10.0


# Rows of a panel of H, at least; narrower ones keep a GPU's or a core's multipliers waiting.
_PANEL_ROWS = {"cuda": 1024, "cpu": 128}


class Hessian:
    """Sum of 2·x·xᵀ over tokens, each with its weight.

    H is symmetric, so panels of rows are summed up to the end of their own diagonal block alone: nine sixteenths of the
    work for eight panels. `sum`, float32 [in_features, in_features], holds nothing beyond them; `mean` is all of H.
    `tokens` is how many there were, `total` the sum of their weights, by which the mean is taken.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self.total = 0.0

    def add(self, inputs: Tensor, token_cap: float = 0.0, weights: Tensor | None = None) -> None:
        """Accumulate inputs [..., in_features] of any float dtype; every vector is one token.

        On a GPU 16-bit inputs are multiplied as they are and summed in float32: their products are exact in float32,
        so that this loses nothing against casting first, and tensor cores do it.

        token_cap  above 0, a token's weight in the sum is limited as `token_weights` says, in float32.
        weights    float32 [tokens] of any scale, in the sum and in its total; None is 1 for each.
        """
        vectors = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += vectors.shape[0]
        self.total += _total(vectors, weights)
        if _as_they_are(vectors, token_cap, weights):
            for start, stop in self._panels():
                panel = self.sum[start:stop, :stop]
                torch.addmm(panel, vectors[:, start:stop].t(), vectors[:, :stop], torch.float32, alpha=2.0, out=panel)
            return
        vectors = vectors.float()
        weighted = _weighted(vectors, token_cap, weights)
        for start, stop in self._panels():
            self.sum[start:stop, :stop].addmm_(weighted[:, start:stop].t(), vectors[:, :stop], alpha=2.0)

    def fill_up(self, prior: Hessian, tokens: int) -> None:
        """Make up for the tokens missing to `tokens` with as many average ones of `prior`.

        H = (n·H + (tokens − n)·H_prior) / tokens for n < tokens, a missing token weighing what those of this one do in
        the mean: shrinkage of a covariance that too few vectors
        determine towards one that many do (Ledoit and Wolf, "A well-conditioned estimator for large-dimensional
        covariance matrices", 2004), here with a fixed weight.
        """
        missing = tokens - self.tokens
        if missing > 0:
            more = missing * (self.total / self.tokens if self.tokens else 1.0)
            self.sum += prior.mean() * more
            self.tokens, self.total = tokens, self.total + more

    def mean(self) -> Tensor:
        """H, normalised by the tokens' weights. ValueError if no token has been seen."""
        if self.tokens == 0:
            raise ValueError("no calibration token reached this layer")
        mean = self.sum / self.total
        for start, stop in self._panels():
            mean[:start, start:stop] = mean[start:stop, :start].t()
        return mean

    def _panels(self) -> Iterator[tuple[int, int]]:
        """(first row, row behind the last) of each."""
        features = len(self.sum)
        rows = max(_PANEL_ROWS[self.sum.device.type], -(-features // (8 * 128)) * 128)
        return ((start, min(start + rows, features)) for start in range(0, features, rows))


class Cross:
    """Sum of 2·(x − x̃)·x̃ᵀ over tokens, float32 [in_features, in_features]: C of `target.corrected_target`."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0
        self.total = 0.0

    def add(self, full: Tensor, arriving: Tensor, token_cap: float = 0.0, weights: Tensor | None = None) -> None:
        """full x and arriving x̃, [..., in_features] each, the same tokens; weighted as in `Hessian.add`.

        On a GPU 16-bit inputs are subtracted and multiplied as they are: their difference is rounded to 16 bits once.
        """
        x, y = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (full, arriving))
        self.tokens += len(x)
        self.total += _total(y, weights)
        if _as_they_are(y, token_cap, weights):
            torch.addmm(self.sum, (x - y).t(), y, torch.float32, alpha=2.0, out=self.sum)
        else:
            x, y = x.float(), y.float()
            self.sum.addmm_((x - y).t(), _weighted(y, token_cap, weights), alpha=2.0)

    def mean(self) -> Tensor:
        """C, normalised by the tokens' weights."""
        return self.sum / (self.total or 1.0)


def token_weights(vectors: Tensor, cap: float) -> Tensor:
    """min(1, cap·median(‖x‖²)/‖x‖²) for each x of vectors [tokens, in_features] → float32 [tokens].

    The first token of a sequence has enormous activations in Llama models (Sun et al., "Massive Activations in Large
    Language Models", arXiv 2402.17762); without a cap it rules H and the damping.
    """
    energy = vectors.float().square().sum(dim=-1)
    return (cap * energy.median() / energy.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)


def equal_samples(lengths: Sequence[int], copies: int, device: torch.device) -> Tensor:
    """1/T for each token of samples of T tokens, one behind the other → float32 [copies·ΣT].

    So a long document has no more say in H than a short one: the mean over documents of their own means, in the place
    of the mean over tokens. copies  sequences of these lengths in a batch, one behind the other.
    """
    sizes = torch.tensor(lengths, dtype=torch.int64, device=device)
    return (1 / sizes.float()).repeat_interleave(sizes).repeat(copies)


def _as_they_are(vectors: Tensor, token_cap: float, weights: Tensor | None) -> bool:
    """Whether tensor cores can multiply them, in 16 bits with sums in float32."""
    return weights is None and token_cap <= 0 and vectors.is_cuda and vectors.dtype in (torch.float16, torch.bfloat16)


def _total(vectors: Tensor, weights: Tensor | None) -> float:
    return float(len(vectors)) if weights is None else float(weights.sum(dtype=torch.float64))


def _weighted(vectors: Tensor, token_cap: float, weights: Tensor | None) -> Tensor:
    """float32 vectors [tokens, in_features], each times its weight."""
    if token_cap > 0:
        capped = token_weights(vectors, token_cap)
        weights = capped if weights is None else capped * weights
    return vectors if weights is None else vectors * weights[:, None]


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of the damped inverse, (H + λI)⁻¹ = Uᵀ·U, and the damping it took."""

    upper: Tensor
    damp_percent: float


class NotPositiveDefinite(ValueError):
    """Damping up to MAX_DAMP_PERCENT did not make the Hessian positive definite."""


def damp(hessian: Tensor, damp_percent: float) -> Tensor:
    """H + λI with λ = damp_percent · mean(diag H).

    An input feature that never fired has a row of zeros; its diagonal becomes the mean of the others, so that its
    weights are rounded on their own without pushing the damping about.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else torch.ones((), device=hessian.device)
    diagonal.copy_(torch.where(live, diagonal, mean) + damp_percent * mean)
    return damped


def inverse_factor(damped: Tensor) -> Tensor | None:
    """U, upper triangular, with damped⁻¹ = Uᵀ·U; None if `damped` is not positive definite in float32.

    With J the flip of rows and columns, J·H·J = L·Lᵀ gives H = R·Rᵀ where R = J·L·J is upper triangular,
    hence H⁻¹ = (R⁻¹)ᵀ·R⁻¹: one Cholesky and one triangular solve instead of Cholesky, inverse, Cholesky.
    """
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) != 0:
        return None
    identity = torch.eye(damped.shape[0], dtype=damped.dtype, device=damped.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper if bool(torch.isfinite(upper).all()) else None


def factor(hessian: Tensor, damp_percent: float) -> Factor:
    """Factor H with the asked damping; while it is not positive definite, ten times more, up to a bound.

    Raises NotPositiveDefinite beyond MAX_DAMP_PERCENT and ValueError for NaN or Inf in the Hessian.
    The damping that was used is returned, so that a caller can say so loudly.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("its inputs in the calibration hold NaN or Inf")
    tried = []
    while True:
        upper = inverse_factor(damp(hessian, damp_percent))
        if upper is not None:
            return Factor(upper, damp_percent)
        tried.append(f"{damp_percent:g}")
        if damp_percent >= MAX_DAMP_PERCENT:
            raise NotPositiveDefinite(f"the Hessian is not positive definite even with damping {', '.join(tried)}")
        damp_percent = min(damp_percent * 10, MAX_DAMP_PERCENT)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    """tr((W−Q)·H·(W−Q)ᵀ) / tr(W·H·Wᵀ): squared output error over squared output, 0 if the output is 0.

    Without a Hessian (nothing was calibrated) the plain ‖W−Q‖² / ‖W‖².
    """
    return _energy(weight.float() - quantized.float(), hessian) / (_energy(weight.float(), hessian) or 1.0)


def _energy(weight: Tensor, hessian: Tensor | None) -> float:
    """tr(W·H·Wᵀ); on a GPU the product is of bfloat16 roundings, which moves the sum by far less than 0.1 %."""
    if hessian is None:
        image = weight
    elif weight.is_cuda:
        image = torch.mm(weight.bfloat16(), hessian.bfloat16(), torch.float32)
    else:
        image = weight @ hessian
    return float((image * weight).sum(dtype=torch.float64))
