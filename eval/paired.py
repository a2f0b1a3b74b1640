"""Whether two models that answered the same questions differ: paired tests, and the error of the difference.

Right-or-wrong scores: McNemar's test in its exact form (McNemar, *Psychometrika* 12, 1947): only questions that one
model has right and the other wrong tell anything; if the models are equally good, the number b of those the model
gained is binomial(b + c, 1/2). The p-value is two-sided.

Other scores: the mean of the per-question differences over its standard error, against the normal distribution (the
paired z-test; see Miller, *Adding Error Bars to Evals*, 2024, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MCNEMAR = "McNemar, exact"
PAIRED_Z = "paired z-test, normal approximation"


@dataclass(frozen=True)
class PairedTest:
    """model − baseline over `questions`; gained and lost count right-or-wrong scores, else they are None.

    p_value is None where nothing can be tested: fewer than two questions.
    """

    difference: float
    difference_standard_error: float | None
    test: str
    p_value: float | None
    questions: int
    gained: int | None = None
    lost: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_test(model: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Compare scores of the same questions in the same order; ValueError for unequal or no questions."""
    if len(model) != len(baseline) or not len(model):
        raise ValueError(f"scores: got {len(model)} and {len(baseline)} questions, expected the same number, not 0")
    differences = [float(one) - float(other) for one, other in zip(model, baseline, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    error = None
    if count > 1:
        error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1) / count)
    if set(model) | set(baseline) <= {0, 1}:
        gained, lost = (sum(d == sign for d in differences) for sign in (1, -1))
        return PairedTest(mean, error, MCNEMAR, mcnemar(gained, lost), count, gained, lost)
    return PairedTest(mean, error, PAIRED_Z, _z_test(mean, error), count)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value: 2 · P(X ≤ min(gained, lost)) for X ~ binomial(gained + lost, 1/2), at most 1."""
    total = gained + lost
    if total >= 1000:
        return _large_mcnemar(min(gained, lost), total)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total)


def _large_mcnemar(fewer: int, total: int) -> float:
    """The same sum in logarithms, where the integers no longer fit a float."""
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    top = max(logs)
    return min(1.0, 2 * math.exp(top - total * math.log(2)) * math.fsum(math.exp(log - top) for log in logs))


def _z_test(mean: float, error: float | None) -> float | None:
    if error is None:
        return None
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return math.erfc(abs(mean) / error / math.sqrt(2))
