"""Metrics against scikit-learn and scipy, on ordinary and on degenerate predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from train.config.tasks import GLUE, metric_names
from train.loop.metrics import (
    accuracy,
    compute_metrics,
    f1,
    is_better,
    macro_f1,
    matthews,
    mse,
    pearson,
    spearman,
)


def pairs(elements: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.tuples(elements, elements), min_size=2, max_size=40).map(lambda rows: np.array(rows).T)


classes = pairs(st.integers(0, 3))
binary = pairs(st.integers(0, 1))
# Halves of whole numbers repeat, so ties and constants occur, and are exact, so both sides agree on what is constant.
values = pairs(st.integers(-20, 20).map(lambda n: n / 2))


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@given(classes)
def test_classification_equals_sklearn(both):
    predictions, labels = both
    assert accuracy(predictions, labels) == pytest.approx(
        sklearn.metrics.accuracy_score(labels, predictions), abs=1e-12
    )
    expected = sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert macro_f1(predictions, labels) == pytest.approx(expected, abs=1e-12)
    expected = sklearn.metrics.matthews_corrcoef(labels, predictions)
    assert matthews(predictions, labels) == pytest.approx(expected, abs=1e-12)


@given(binary)
def test_f1_equals_sklearn(both):
    predictions, labels = both
    assert f1(predictions, labels) == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, zero_division=0), abs=1e-12
    )


@given(values)
def test_regression_equals_scipy(both):
    predictions, labels = both
    assert mse(predictions, labels) == pytest.approx(sklearn.metrics.mean_squared_error(labels, predictions), abs=1e-12)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        assert pearson(predictions, labels) == spearman(predictions, labels) == 0.0
    else:
        expected = scipy.stats.pearsonr(predictions, labels).statistic
        assert pearson(predictions, labels) == pytest.approx(expected, abs=1e-12)
        expected = scipy.stats.spearmanr(predictions, labels).statistic
        assert spearman(predictions, labels) == pytest.approx(expected, abs=1e-12)


def test_large_samples_in_float32_keep_their_precision():
    rng = np.random.default_rng(0)
    labels = rng.normal(1000, 1, 70_001).astype(np.float32)
    predictions = (labels + rng.normal(0, 0.5, labels.shape)).astype(np.float32)
    expected = scipy.stats.pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic
    assert pearson(predictions, labels) == pytest.approx(expected, abs=1e-10)
    guesses, truth = rng.integers(0, 2, (2, 400_003)).astype(np.int32)
    assert matthews(guesses, truth) == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, guesses), abs=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_head_scores_zero_not_nan(name):
    # 0.1 in float32 has a mean that is not 0.1: centring it leaves noise, which correlates with anything.
    constant = np.full(7, 0.1, np.float32)
    assert compute_metrics([name], constant, np.arange(7, dtype=np.float32)) == {name: 0.0}


def test_compute_metrics_refuses_what_it_cannot_score():
    with pytest.raises(FloatingPointError, match="2 of 3 predictions are not finite"):
        compute_metrics(["mse"], np.array([math.nan, 1, math.inf]), np.zeros(3))
    with pytest.raises(ValueError, match="equal, non-empty"):
        compute_metrics(["accuracy"], np.array([], int), np.array([], int))
    with pytest.raises(ValueError, match=r"\(3,\).*\(3, 1\)"):
        compute_metrics(["accuracy"], np.zeros(3), np.zeros((3, 1)))


def test_the_first_metric_of_a_task_ranks_checkpoints():
    first = {name: metric_names(f"glue/{name}", task.task)[0] for name, task in GLUE.items()}
    assert first == {
        "cola": "matthews", "mnli": "accuracy", "mrpc": "accuracy", "qnli": "accuracy", "qqp": "accuracy",
        "rte": "accuracy", "sst2": "accuracy", "stsb": "pearson", "wnli": "accuracy",
    }  # fmt: skip
    assert metric_names(None, "classification")[0] == metric_names("imdb", "classification")[0] == "accuracy"
    with pytest.raises(ValueError, match=r"glue/rtee.*glue/rte"):
        metric_names("glue/rtee", "classification")


def test_every_named_metric_can_be_computed():
    names = {name for task in GLUE.values() for name in task.metrics}
    names |= {name for task in ("classification", "regression") for name in metric_names(None, task)}
    scores = compute_metrics(sorted(names), np.array([0, 1, 1]), np.array([0, 1, 1]))
    assert scores == pytest.approx({name: 0.0 if name == "mse" else 1.0 for name in names})


def test_is_better():
    assert is_better("accuracy", 0.9, 0.8)
    assert not is_better("accuracy", 0.8, 0.8)
    assert is_better("mse", 0.8, 0.9)
    assert not is_better("loss", 0.9, 0.8)
    assert is_better("loss", 0.9, None)
    assert not is_better("loss", math.nan, None)
    assert not is_better("accuracy", math.nan, 0.1)
