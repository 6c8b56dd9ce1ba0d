"""report.html of one run: a self-contained page made from the run folder's files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from markupsafe import Markup

from melora_jax.core import effective_rank, numerical_rank
from train.report import figures
from train.report.figures import Plot
from train.report.html import render
from train.run_folder.folder import Run, Site, read_run
from train.run_folder.log import Event, replace_text

FILE_NAME = "report.html"
_MOST_SPECTRA = 6
_MOST_OPEN_ROWS = 12
_SITE_HEADERS = ("layer", "d_in", "d_out", "n", "r", "rank", "parameters", "scale", "mixer", "strategy")


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Writes `run_folder`/report.html from the folder's files alone, whole or not at all.

    Args:
      run_folder: holds config.toml, metrics.jsonl, sites.json and, at best, spectra.json and versions.json.

    Returns:
      The page's path.

    Raises:
      ValueError: a file is missing or malformed; names it and the remedy. An older report stays as it was.
    """
    run = read_run(run_folder)
    page = render(
        "report.html",
        run=run,
        kind="Training report",
        title=f"{run.method}, {run.folder.name}",
        heading=run.method,
        tiles=_headline(run),
        loss=_loss(run),
        loss_note=figures.LOSS_NOTE,
        evaluations=_evaluations(run),
        learning_rate=_learning_rate(run),
        spectra=_spectra(run),
        sites=_sites(run),
        most_open_rows=_MOST_OPEN_ROWS,
    )
    path = run.folder / FILE_NAME
    replace_text(path, page)
    return path


def _headline(run: Run) -> list[tuple[str, str, str]]:
    """The headline numbers: (what, value, a line of detail)."""
    best = run.best
    metric = run.metrics[0] if run.metrics else "score"
    score, when = "-", "no evaluation yet"
    if best and metric in best:
        score, when = f"{best[metric]:.4f}", f"step {best['step']:,} of {run.last_step:,}"
    share = run.beside_head / max(run.beside_head + run.head + run.frozen, 1)
    trained = "base parameters" if run.base and not run.adapter else "adapter parameters"
    trained = "adapter and base parameters" if run.base and run.adapter else trained
    pace = f"{run.seconds_per_epoch:.1f} s an epoch" if run.seconds_per_epoch else ""
    return [
        (f"best {metric}", score, when),
        (trained, f"{run.beside_head:,}", f"{share:.2%} of the model"),
        ("head parameters", f"{run.head:,}", "trained beside"),
        ("steps", f"{run.last_step:,}", f"{run.last.get('epoch', 0):.3g} epochs"),
        ("time", duration(float(run.last.get("seconds", 0.0))), pace),
    ]


def _loss(run: Run) -> Plot | None:
    if not run.steps:
        return None
    labels, series = {0: "training"}, [*figures.loss_series(run.steps)]
    if any("loss" in event for event in run.evaluations):
        labels[1] = "held out"
        series.append(figures.metric_series(run.evaluations, "loss", colour=1))
    return figures.plot(figures.curves("loss", "Training and held-out loss over steps", series, "loss"), labels)


def _evaluations(run: Run) -> dict[str, Any]:
    """The plot of the metrics besides the loss, and the table of all of them."""
    names = [name for name in run.metrics if name != "loss"]
    drawn = None
    if names:
        series = [figures.metric_series(run.evaluations, name, colour) for colour, name in enumerate(names)]
        drawing = figures.curves("metrics", "Held-out metrics over steps", series, "score")
        drawn = figures.plot(drawing, dict(enumerate(names)))
    rows = [_evaluation_row(run, event) for event in run.evaluations]
    return {"plot": drawn, "headers": ["step", "epoch", *run.metrics, ""], "rows": rows}


def _evaluation_row(run: Run, event: Event) -> list[str]:
    scores = [f"{event[name]:.4f}" if name in event else "-" for name in run.metrics]
    return [f"{event['step']:,}", f"{event.get('epoch', 0):.2f}", *scores, "best" if event is run.best else ""]


def _learning_rate(run: Run) -> Plot | None:
    if not any("learning_rate" in event for event in run.steps):
        return None
    series = [figures.metric_series(run.steps, "learning_rate", dots=False)]
    return Plot(figures.curves("rate", "Learning rate over steps", series, "learning rate", height=170))


def _spectra(run: Run) -> list[tuple[str, str, Markup | str]]:
    """(path, caption, drawing) of at most `_MOST_SPECTRA` layers, spread evenly from the first to the last."""
    known = {site.path: site for site in run.sites}
    paths = [path for path in run.spectra if path in known]
    if len(paths) > _MOST_SPECTRA:
        paths = [paths[k * len(paths) // _MOST_SPECTRA] for k in range(_MOST_SPECTRA)]
    return [(path, *_spectrum(f"spectrum{index}", known[path], run)) for index, path in enumerate(paths)]


def _spectrum(name: str, site: Site, run: Run) -> tuple[str, Markup | str]:
    values = run.spectra[site.path]
    rank, most = numerical_rank(values), min(site.d_in, site.d_out)
    if not rank:
        return "ΔW is zero: this layer was not trained", ""
    caption = f"rank {rank} of {most}, effective rank {effective_rank(values):.1f}"
    return caption, figures.spectrum(name, f"Singular values, {caption}", {0: values}, site.rank)


def _sites(run: Run) -> dict[str, Any]:
    """The table of the adapted layers and one line on it, or why there is none."""
    if run.sites:
        summary = f"{len(run.sites)} layers, {run.adapter:,} parameters; {run.frozen:,} frozen ones beside them"
    elif run.base:
        summary = f"None: {run.base:,} parameters of the base and {run.head:,} of the head were trained."
    else:
        summary = f"None: only the {run.head:,} parameters of the head were trained."
    return {"summary": summary, "headers": _SITE_HEADERS, "rows": [_site_row(site) for site in run.sites]}


def _site_row(site: Site) -> list[str]:
    sizes = [f"{site.d_in:,}", f"{site.d_out:,}", f"{site.n}", _listed(site.r), f"{site.rank}", f"{site.parameters:,}"]
    return [site.path, *sizes, _listed(site.scaling), site.mixer, site.strategy]


def _listed(values: object) -> str:
    """One value a mini; stated once where all are equal."""
    items = values if isinstance(values, list) else [values]
    words = [f"{item:g}" if isinstance(item, int | float) else str(item) for item in items]
    return words[0] if len(set(words)) == 1 else ", ".join(words)


def duration(seconds: float) -> str:
    """12.3 s, 4 min 5 s or 2 h 3 min.

    >>> duration(245)
    '4 min 5 s'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes} min {second} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
