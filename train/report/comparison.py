"""report.html of several runs of one task, laid over each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from melora_jax.core import effective_rank, numerical_rank
from train.report.html import Html, card, code, document, folded, note, table
from train.report.report import FILE_NAME, command_card, header, plots, versions
from train.report.run_rows import comparison_rows, shared_metric
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
    metric = shared_metric(runs)
    first = next(iter(runs.values()))
    cards = [_result(runs), _scores(runs, metric), *_metric(runs, metric), _losses(runs), _spectra(runs)]
    if commands:
        cards.append(command_card(commands))
    cards.append(card("Configurations", *(folded(label, code(run.config_text)) for label, run in runs.items())))
    path = Path(folder) / FILE_NAME
    replace_text(path, document(title, header("Comparison", title, first), *cards, versions(first)))
    return path


def _result(runs: Mapping[str, Run]) -> Html:
    explain = (
        "The score is that of each run's best evaluation. The rank is measured on the trained updates. "
        "Seconds per epoch count everything: compiling, training and evaluation."
    )
    return card("Result", table(*comparison_rows(runs)), note(explain))


def _scores(runs: Mapping[str, Run], metric: str) -> Html:
    title = f"Held-out {metric} and adapter parameters"
    points = {
        index: (run.beside_head, float(run.best[metric]))
        for index, run in enumerate(runs.values())
        if run.best and metric in run.best
    }
    if not points:
        return card(title, note("No evaluation yet."))
    legend = plots.legend({index: list(runs)[index] for index in points}, markers=True)
    figure = plots.score_by_parameters("scores", title, points)
    return card(title, legend, figure, *_missing(runs, points, "has no evaluation yet"))


def _metric(runs: Mapping[str, Run], metric: str) -> list[Html]:
    """The metric's course; no card where each run was evaluated once, which the scores above show."""
    title = f"Held-out {metric}"
    series = [plots.metric_series(run.evaluations, metric, colour) for colour, run in enumerate(runs.values())]
    if all(len(one.x) < 2 for one in series):
        return []
    figure = plots.curves("metric", f"{title} over steps", series, "score")
    return [card(title, plots.legend(dict(enumerate(runs))), figure)]


def _losses(runs: Mapping[str, Run]) -> Html:
    series = [plots.loss_series(run.steps, colour)[1] for colour, run in enumerate(runs.values())]
    if not any(one.x for one in series):
        return card("Training loss", note("No training step was logged yet."))
    figure = plots.curves("loss", "Training loss over steps", series, "loss")
    explain = f"Exponential means, weight {plots.LOSS_WEIGHT:g}, of the logged losses."
    return card("Training loss", plots.legend(dict(enumerate(runs))), figure, note(explain))


def _spectra(runs: Mapping[str, Run]) -> Html:
    """The layer of which most runs have saved a spectrum, all runs in one figure."""
    title = "Spectrum of one trained update"
    saved = [path for run in runs.values() for path, values in run.spectra.items() if values.any()]
    if not saved:
        return card(title, note("No spectrum was saved with these runs."))
    path = max(saved, key=saved.count)
    spectra = {index: run.spectra[path] for index, run in enumerate(runs.values()) if path in run.spectra}
    ranks = {index: numerical_rank(values) for index, values in spectra.items()}
    labels = {
        index: f"{list(runs)[index]}: rank {ranks[index]}, effective rank {effective_rank(values):.1f}"
        for index, values in spectra.items()
    }
    describe = "Singular values of each run's update, largest first"
    figure = plots.spectrum("spectrum", describe, spectra, max(ranks.values()), width=760)
    explain = f"Singular values of ΔW at {path}, on a logarithmic axis. After its last marker a run has zeros alone."
    absent = _missing(runs, spectra, "has no spectrum of that layer")
    return card(title, plots.legend(labels, markers=True), figure, note(explain), *absent)


def _missing(runs: Mapping[str, Run], present: Mapping[int, object], why: str) -> list[Html]:
    """A sentence for each run that a figure can't show."""
    return [note(f"Not shown: {label} {why}.") for index, label in enumerate(runs) if index not in present]
