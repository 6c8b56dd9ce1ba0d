"""Metrics of classification and regression in NumPy, and which of two values is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_LOWER_IS_BETTER = frozenset({"mse", "loss", "perplexity"})


def is_better(name: str, value: float, best: float | None) -> bool:
    """Whether `value` of the metric (or loss) beats `best`; lower is better for mse, loss, perplexity. NaN never wins.

    >>> is_better("accuracy", 0.9, 0.8), is_better("mse", 0.9, 0.8), is_better("mse", 0.9, None)
    (True, False, True)
    """
    if best is None:
        return not np.isnan(value)
    return value < best if name in _LOWER_IS_BETTER else value > best


def compute_metrics(names: Sequence[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Each named metric of `predictions` against `labels`.

    Args:
      names: from `train.config.tasks.metric_names`.
      predictions: class numbers, int [rows], or values, float [rows].
      labels: the same for the truth.

    Raises:
      ValueError: no rows, or arrays of different shapes.
      FloatingPointError: predictions that are NaN or infinite.

    >>> compute_metrics(["accuracy"], np.array([1, 0, 1]), np.array([1, 1, 1]))
    {'accuracy': 0.6666666666666666}
    """
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must be two equal, non-empty rows")
    broken = int(np.sum(~np.isfinite(predictions)))
    if broken:
        raise FloatingPointError(
            f"{broken} of {len(predictions)} predictions are not finite; lower optim.learning_rate"
        )
    return {name: float(_METRICS[name](predictions, labels)) for name in names}


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries."""
    return float(np.mean(predictions == labels))


def f1(predictions: np.ndarray, labels: np.ndarray, positive: int = 1) -> float:
    """2·TP / (2·TP + FP + FN) of the class `positive`; 0 where that is 0/0."""
    hits = int(np.sum((predictions == positive) & (labels == positive)))
    total = int(np.sum(predictions == positive) + np.sum(labels == positive))
    return 2 * hits / total if total else 0.0


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 over the classes that occur in either array."""
    return float(np.mean([f1(predictions, labels, int(c)) for c in np.union1d(predictions, labels)]))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004, R_K); 0 where either array is constant."""
    _, both = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    guessed, true = both[: len(labels)], both[len(labels) :]
    classes = int(both.max()) + 1
    n_guessed, n_true = (np.bincount(x, minlength=classes).astype(np.float64) for x in (guessed, true))
    rows = float(len(labels))
    covariance = float(np.sum(guessed == true)) * rows - n_guessed @ n_true
    spread = (rows**2 - n_guessed @ n_guessed) * (rows**2 - n_true @ n_true)
    return float(covariance / np.sqrt(spread)) if spread else 0.0


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation in float64; 0 where either array is constant (scipy: NaN, which no best-keeping survives)."""
    x, y = predictions.astype(np.float64), labels.astype(np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of the ranks, ties at their mean rank; 0 where either array is constant."""
    # A third of the time that the application takes to start, for one metric of one task.
    from scipy.stats import rankdata

    return pearson(rankdata(predictions), rankdata(labels))


def mse(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error in float64; lower is better."""
    return float(np.mean((predictions.astype(np.float64) - labels.astype(np.float64)) ** 2))


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
}
