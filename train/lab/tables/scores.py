"""Statistics over seeds: means, intervals, and whether one method's scores differ from another's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import t as student_t

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean of `count` values, and half the width of its confidence interval, NaN for a single value."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.half) else f" ± {self.half:.4f}")


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's t interval of the mean: mean ± t_{(1+level)/2, m-1}·s/√m.

    Args:
      values: a score for each seed, at least one.
      level: of confidence.

    >>> str(interval([0.7, 0.8, 0.9]))
    '0.8000 ± 0.2484'
    """
    scores = np.asarray(values, np.float64)
    if not len(scores):
        raise ValueError("an interval needs at least one value")
    if len(scores) == 1:
        return Interval(float(scores[0]), math.nan, 1)
    half = student_t.ppf((1 + level) / 2, len(scores) - 1) * scores.std(ddof=1) / math.sqrt(len(scores))
    return Interval(float(scores.mean()), float(half), len(scores))


Verdict = Literal["wins", "ties", "loses", "one seed"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """How an arm's scores differ from the reference's, seed by seed, and the verdict at the confidence level."""

    interval: Interval
    verdict: Verdict


def difference(scores: Sequence[float], reference: Sequence[float], level: float = LEVEL) -> Difference:
    """The paired difference of two arms at the same seeds; an interval that contains 0 is a tie.

    Raises:
      ValueError: the numbers of scores differ.

    >>> difference([0.71, 0.72, 0.74], [0.61, 0.63, 0.64]).verdict
    'wins'
    """
    if len(scores) != len(reference):
        raise ValueError(f"{len(scores)} scores can't be paired with {len(reference)}; run both arms with equal seeds")
    found = interval([ours - theirs for ours, theirs in zip(scores, reference, strict=True)], level)
    if found.count == 1:
        return Difference(found, "one seed")
    if abs(found.mean) <= found.half:
        return Difference(found, "ties")
    return Difference(found, "wins" if found.mean > 0 else "loses")
