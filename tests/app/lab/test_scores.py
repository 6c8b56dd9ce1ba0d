"""Intervals over seeds against scipy's own, and the verdicts drawn from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from train.lab.tables.scores import difference, interval

SCORES = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=9)


@given(SCORES, st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_is_students(values: list[float], level: float) -> None:
    found = interval(values, level)
    spread = np.std(values, ddof=1)
    if spread < 1e-6:
        return
    low, high = stats.t.interval(level, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose([found.mean - found.half, found.mean + found.half], [low, high], rtol=1e-9, atol=1e-12)


@given(SCORES.filter(lambda values: np.std(values) > 1e-3))
def test_a_verdict_is_a_paired_t_test(values: list[float]) -> None:
    reference = np.linspace(0.2, -0.3, len(values))
    found = difference(values, reference)
    test = stats.ttest_rel(values, reference)
    if abs(test.pvalue - 0.05) > 1e-6:
        assert (found.verdict == "ties") == (test.pvalue > 0.05)
        assert found.verdict == "ties" or (found.verdict == "wins") == (test.statistic > 0)


def test_one_seed_has_no_interval() -> None:
    assert math.isnan(interval([0.5]).half)
    assert str(interval([0.5])) == "0.5000"
    assert difference([0.5], [0.4]).verdict == "one seed"


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match="2 scores can't be paired with 1"):
        difference([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="at least one"):
        interval([])
