"""Paired tests against sums that can be done by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest

from marlin_gptq.eval.paired import MCNEMAR, PAIRED_Z, _large_mcnemar, mcnemar, paired_test


@pytest.mark.parametrize("total", [0, 1, 2, 5, 8])
def test_mcnemar_counts_coin_tosses(total: int) -> None:
    """The p-value is the share of all sequences of fair tosses at least as uneven."""
    for gained in range(total + 1):
        uneven = min(gained, total - gained)
        rows = list(product((0, 1), repeat=total))
        extreme = sum(sum(row) <= uneven or sum(row) >= total - uneven for row in rows)
        assert mcnemar(gained, total - gained) == pytest.approx(extreme / len(rows))


def test_mcnemar_of_many_questions() -> None:
    assert _large_mcnemar(300, 700) == pytest.approx(mcnemar(300, 400), rel=1e-9)
    assert mcnemar(5200, 5000) == pytest.approx(math.erfc(199 / math.sqrt(10200) / math.sqrt(2)), rel=1e-3)
    assert mcnemar(5000, 5200) == mcnemar(5200, 5000)
    assert mcnemar(9000, 1000) == pytest.approx(0, abs=1e-300)
    assert mcnemar(6000, 6000) == 1.0


def test_right_or_wrong_scores() -> None:
    model, baseline = [1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0]
    result = paired_test(model, baseline)
    assert (result.test, result.gained, result.lost, result.questions) == (MCNEMAR, 2, 1, 6)
    assert result.difference == pytest.approx(1 / 6)
    assert result.p_value == 1.0
    differences = [0, 1, -1, 0, 1, 0]
    variance = sum((d - 1 / 6) ** 2 for d in differences) / 5
    assert result.difference_standard_error == pytest.approx(math.sqrt(variance / 6))


def test_other_scores() -> None:
    baseline = [0.1 * i for i in range(50)]
    result = paired_test([score + 0.3 + (-1) ** i * 0.9 for i, score in enumerate(baseline)], baseline)
    assert result.test == PAIRED_Z and result.gained is None
    assert result.difference == pytest.approx(0.3)
    z = 0.3 / (0.9 * math.sqrt(50 / 49) / math.sqrt(50))
    assert result.p_value == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert paired_test(baseline, baseline).p_value == 1.0
    assert paired_test([score + 1 for score in baseline], baseline).p_value == pytest.approx(0, abs=1e-12)
    assert paired_test([0.5], [0.25]).p_value is None


def test_unequal_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="scores: got 2 and 1 questions, expected the same number"):
        paired_test([1, 0], [1])
    with pytest.raises(ValueError, match="not 0"):
        paired_test([], [])
