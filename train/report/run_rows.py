"""Runs as the rows of a table that compares them."""

from __future__ import annotations

from collections.abc import Mapping

from train.run_folder.folder import Run


def comparison_rows(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of a table that compares runs: one row a run, numbers as text.

    Args:
      runs: label → run, in the order of the rows. All must be ranked by one metric.

    Raises:
      ValueError: there is no run, or two runs were ranked by different metrics.
    """
    metric = shared_metric(runs)
    trained = "adapter or base parameters" if any(run.base for run in runs.values()) else "adapter parameters"
    headers = ["method", trained, "head parameters", "ΔW rank", "learning rate"]
    headers += [f"held-out {metric}", "s/epoch"]
    rows = []
    for label, run in runs.items():
        ranks = " to ".join(str(rank) for rank in dict.fromkeys([*run.ranks[:1], *run.ranks[-1:]]))
        score = run.best.get(metric) if run.best else None
        cells = [label, f"{run.beside_head:,}", f"{run.head:,}", ranks or "-"]
        cells += [_or_dash(run.setting("optim", "learning_rate"), ".2g"), _or_dash(score, ".4f")]
        rows.append([*cells, _or_dash(run.seconds_per_epoch, ".1f")])
    return headers, rows


def shared_metric(runs: Mapping[str, Run]) -> str:
    """The metric by which every run ranked its checkpoints; "score" before any evaluation.

    Raises:
      ValueError: there is no run, or two runs were ranked by different metrics.
    """
    if not runs:
        raise ValueError("there is no run to compare; give at least one run folder")
    ranking = {label: run.metrics[0] for label, run in runs.items() if run.metrics}
    if len(set(ranking.values())) > 1:
        chosen = ", ".join(f"{label} by {metric}" for label, metric in ranking.items())
        raise ValueError(f"the runs were ranked by different metrics ({chosen}); compare runs of one task")
    return next(iter(ranking.values()), "score")


def _or_dash(value: float | bool | str | None, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"
