"""Runs of one task side by side: as report.html, and as a table for the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from melora_jax.core import effective_rank, numerical_rank
from train.report import figures
from train.report.figures import Plot
from train.report.html import render
from train.report.report import FILE_NAME
from train.report.tables import terminal_table
from train.report.terminal import WIDTH
from train.run_folder.folder import Run
from train.run_folder.log import replace_text


def write_comparison(
    folder: str | os.PathLike[str],
    runs: Mapping[str, Run],
    title: str = "Methods compared",
    commands: Mapping[str, str] | None = None,
) -> Path:
    """Writes `folder`/report.html, which compares runs of one task.

    Args:
      folder: an existing folder.
      runs: label → run (see `read_run`), in the order of rows and colours.
      title: the page's heading.
      commands: what a command does → the command, shown for copying.

    Returns:
      The page's path.

    Raises:
      ValueError: there is no run, or two runs were ranked by different metrics.
    """
    metric = _shared_metric(runs)
    headers, rows = comparison_rows(runs)
    page = render(
        "comparison.html",
        run=next(iter(runs.values())),
        kind="Comparison",
        title=title,
        heading=title,
        runs=runs,
        metric=metric,
        headers=headers,
        rows=rows,
        scores=_scores(runs, metric),
        course=_course(runs, metric),
        losses=_losses(runs),
        loss_weight=figures.LOSS_WEIGHT,
        spectra=_spectra(runs),
        commands=commands or {},
    )
    path = Path(folder) / FILE_NAME
    replace_text(path, page)
    return path


def comparison_table(runs: Mapping[str, Run]) -> Table:
    """Runs side by side, one a row, for a terminal of 100 columns.

    Args:
      runs: label → run, in the order of the rows.
    """
    headers, rows = comparison_rows(runs)
    # Headers break between their words, and of the cells only labels that leave the numbers too little room.
    widths = [max(map(len, [*header.split(), *(row[column] for row in rows)])) for column, header in enumerate(headers)]
    widths[0] = min(widths[0], max(12, WIDTH - sum(widths[1:]) - 2 * len(widths)))
    return terminal_table(headers, rows, widths=widths)


def comparison_rows(runs: Mapping[str, Run]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of a table that compares runs: one row a run, numbers as text.

    Args:
      runs: label → run, in the order of the rows. All must be ranked by one metric.

    Raises:
      ValueError: there is no run, or two runs were ranked by different metrics.
    """
    metric = _shared_metric(runs)
    trained = "adapter or base parameters" if any(run.base for run in runs.values()) else "adapter parameters"
    headers = ["method", trained, "head parameters", "ΔW rank", "learning rate", f"held-out {metric}", "s/epoch"]
    rows = []
    for label, run in runs.items():
        score = run.best.get(metric) if run.best else None
        cells = [label, f"{run.beside_head:,}", f"{run.head:,}", rank_range(run)]
        cells += [_or_dash(run.setting("optim", "learning_rate"), ".2g"), _or_dash(score, ".4f")]
        rows.append([*cells, _or_dash(run.seconds_per_epoch, ".1f")])
    return headers, rows


def rank_range(run: Run) -> str:
    """The least and the greatest rank of a run's updates: "8", "8 to 64", or "-" without adapters."""
    return " to ".join(str(rank) for rank in dict.fromkeys([*run.ranks[:1], *run.ranks[-1:]])) or "-"


def _shared_metric(runs: Mapping[str, Run]) -> str:
    """The metric by which every run ranked its checkpoints; "score" before any evaluation."""
    if not runs:
        raise ValueError("there is no run to compare; give at least one run folder")
    ranking = {label: run.metrics[0] for label, run in runs.items() if run.metrics}
    if len(set(ranking.values())) > 1:
        chosen = ", ".join(f"{label} by {metric}" for label, metric in ranking.items())
        raise ValueError(f"the runs were ranked by different metrics ({chosen}); compare runs of one task")
    return next(iter(ranking.values()), "score")


def _or_dash(value: float | bool | str | None, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _scores(runs: Mapping[str, Run], metric: str) -> dict[str, Any] | None:
    points = {
        index: (run.beside_head, float(run.best[metric]))
        for index, run in enumerate(runs.values())
        if run.best and metric in run.best
    }
    if not points:
        return None
    drawing = figures.score_by_parameters("scores", f"Held-out {metric} and adapter parameters", points)
    labels = {index: label for index, label in enumerate(runs) if index in points}
    return {"plot": figures.plot(drawing, labels, markers=True), "missing": _missing(runs, points)}


def _course(runs: Mapping[str, Run], metric: str) -> Plot | None:
    """The metric over steps; None where each run was evaluated once, which the scores show already."""
    series = [figures.metric_series(run.evaluations, metric, colour) for colour, run in enumerate(runs.values())]
    if all(len(one.x) < 2 for one in series):
        return None
    return figures.plot(
        figures.curves("metric", f"Held-out {metric} over steps", series, "score"), dict(enumerate(runs))
    )


def _losses(runs: Mapping[str, Run]) -> Plot | None:
    series = [figures.loss_series(run.steps, colour)[1] for colour, run in enumerate(runs.values())]
    if not any(one.x for one in series):
        return None
    return figures.plot(figures.curves("loss", "Training loss over steps", series, "loss"), dict(enumerate(runs)))


def _spectra(runs: Mapping[str, Run]) -> dict[str, Any] | None:
    """The layer whose spectrum most runs have saved, all runs in one figure."""
    saved = [path for run in runs.values() for path, values in run.spectra.items() if values.any()]
    if not saved:
        return None
    path = max(saved, key=saved.count)
    spectra = {index: run.spectra[path] for index, run in enumerate(runs.values()) if path in run.spectra}
    ranks = {index: numerical_rank(values) for index, values in spectra.items()}
    labels = {
        index: f"{list(runs)[index]}: rank {ranks[index]}, effective rank {effective_rank(values):.1f}"
        for index, values in spectra.items()
    }
    describe = "Singular values of each run's update, largest first"
    drawing = figures.spectrum("spectrum", describe, spectra, max(ranks.values()), width=760)
    return {"plot": figures.plot(drawing, labels, markers=True), "path": path, "missing": _missing(runs, spectra)}


def _missing(runs: Mapping[str, Run], present: Mapping[int, object]) -> list[str]:
    """The labels of the runs that a figure can't show."""
    return [label for index, label in enumerate(runs) if index not in present]
