"""report.html of one run: a self-contained page made from the run folder's files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from melora_jax.core import effective_rank, numerical_rank
from train.report import plots
from train.report.html import Html, card, code, document, element, folded, note, table, tiles
from train.run_folder.folder import Run, Site, read_run
from train.run_folder.log import Event, replace_text

FILE_NAME = "report.html"
_MOST_SPECTRA = 6
_MOST_OPEN_ROWS = 12


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
    cards = [_headline(run), _loss(run), _evaluations(run), _learning_rate(run), _spectra(run), _sites(run)]
    cards.append(command_card(run.commands))
    cards.append(card("Configuration", folded("config.toml", code(run.config_text))))
    page = document(
        f"{run.method}, {run.folder.name}", header("Training report", run.method, run), *cards, versions(run)
    )
    path = run.folder / FILE_NAME
    replace_text(path, page)
    return path


def header(kind: str, heading: str, run: Run) -> Html:
    """The page's head: what it is, its title, the model and the data."""
    subject = " · ".join(name for name in (run.model, run.data) if name)
    return element("header", element("p", f"melora_jax · {kind}"), element("h1", heading), element("p", subject))


def command_card(commands: Mapping[str, str]) -> Html:
    """Commands to copy, each under what it does."""
    return card("What to do next", *(part for what, line in commands.items() for part in (note(what), code(line))))


def versions(run: Run) -> Html:
    """The versions that produced the run."""
    if not run.versions:
        return card("Versions", note("No versions.json was saved with this run."))
    listed = ((element("dt", name), element("dd", version)) for name, version in run.versions.items())
    return card("Versions", element("dl", *(element("div", *pair) for pair in listed), class_="versions"))


def _headline(run: Run) -> Html:
    best = run.best
    metric = run.metrics[0] if run.metrics else "score"
    score, when = "-", "no evaluation yet"
    if best and metric in best:
        score, when = f"{best[metric]:.4f}", f"step {best['step']:,} of {run.last_step:,}"
    share = run.beside_head / max(run.beside_head + run.head + run.frozen, 1)
    trained = "base parameters" if run.base and not run.adapter else "adapter parameters"
    trained = "adapter and base parameters" if run.base and run.adapter else trained
    pace = f"{run.seconds_per_epoch:.1f} s an epoch" if run.seconds_per_epoch else ""
    return tiles(
        [
            (f"best {metric}", score, when),
            (trained, f"{run.beside_head:,}", f"{share:.2%} of the model"),
            ("head parameters", f"{run.head:,}", "trained beside"),
            ("steps", f"{run.last_step:,}", f"{run.last.get('epoch', 0):.3g} epochs"),
            ("time", duration(float(run.last.get("seconds", 0.0))), pace),
        ]
    )


def _loss(run: Run) -> Html:
    if not run.steps:
        return card("Loss", note("No training step was logged yet."))
    labels, series = {0: "training"}, [*plots.loss_series(run.steps)]
    if any("loss" in event for event in run.evaluations):
        labels[1] = "held out"
        series.append(plots.metric_series(run.evaluations, "loss", colour=1))
    figure = plots.curves("loss", "Training and held-out loss over steps", series, "loss")
    return card("Loss", plots.legend(labels), figure, note(plots.LOSS_NOTE))


def _evaluations(run: Run) -> Html:
    if not run.evaluations:
        return card("Held-out metrics", note("No evaluation yet."))
    names = [name for name in run.metrics if name != "loss"]
    series = [plots.metric_series(run.evaluations, name, colour) for colour, name in enumerate(names)]
    drawn = (
        [plots.legend(dict(enumerate(names))), plots.curves("metrics", "Held-out metrics over steps", series, "score")]
        if names
        else []
    )
    rows = [_evaluation_row(run, event) for event in run.evaluations]
    numbers = table(["step", "epoch", *run.metrics, ""], rows, text_columns=())
    fold = folded(f"{len(rows)} evaluations", numbers, unfold=len(rows) <= _MOST_OPEN_ROWS)
    return card("Held-out metrics", *drawn, fold)


def _evaluation_row(run: Run, event: Event) -> list[str]:
    scores = [f"{event[name]:.4f}" if name in event else "-" for name in run.metrics]
    return [f"{event['step']:,}", f"{event.get('epoch', 0):.2f}", *scores, "best" if event is run.best else ""]


def _learning_rate(run: Run) -> Html:
    if not any("learning_rate" in event for event in run.steps):
        return card("Learning rate", note("No training step was logged yet."))
    series = [plots.metric_series(run.steps, "learning_rate", dots=False)]
    return card("Learning rate", plots.curves("rate", "Learning rate over steps", series, "learning rate", height=170))


def _spectra(run: Run) -> Html:
    title = "Spectrum of the trained updates"
    known = {site.path: site for site in run.sites}
    paths = [path for path in run.spectra if path in known]
    if not paths:
        return card(title, note("No adapter was trained." if not run.sites else "No spectrum was saved with this run."))
    shown = (
        paths if len(paths) <= _MOST_SPECTRA else [paths[k * len(paths) // _MOST_SPECTRA] for k in range(_MOST_SPECTRA)]
    )
    figures = [_spectrum(index, known[path], run) for index, path in enumerate(shown)]
    explain = (
        f"Singular values of ΔW at {len(shown)} of {len(run.sites)} sites, on a logarithmic axis. The dashed line "
        "stands at the rank the adapter can reach, n·r for MELoRA; all singular values beyond it are zero."
    )
    return card(title, note(explain), element("div", *figures, class_="grid"))


def _spectrum(index: int, site: Site, run: Run) -> Html:
    values = run.spectra[site.path]
    rank, most = numerical_rank(values), min(site.d_in, site.d_out)
    caption = f"rank {rank} of {most}, effective rank {effective_rank(values):.1f}"
    if not rank:
        return element(
            "figure", element("h3", site.path), element("figcaption", "ΔW is zero: this layer was not trained")
        )
    figure = plots.spectrum(f"spectrum{index}", f"Singular values, {caption}", {0: values}, site.rank)
    return element("figure", element("h3", site.path), element("figcaption", caption), figure)


def _sites(run: Run) -> Html:
    if not run.sites:
        what = (
            f"{run.base:,} parameters of the base and {run.head:,}" if run.base else f"only the {run.head:,} parameters"
        )
        return card("Adapted layers", note(f"None: {what} of the head were trained."))
    headers = ["layer", "d_in", "d_out", "n", "r", "rank", "parameters", "scale", "mixer", "strategy"]
    content = table(headers, [_site_row(site) for site in run.sites], text_columns=(0, 8, 9))
    summary = f"{len(run.sites)} layers, {run.adapter:,} parameters; {run.frozen:,} frozen ones beside them"
    return card("Adapted layers", folded(summary, content, unfold=len(run.sites) <= _MOST_OPEN_ROWS))


def _site_row(site: Site) -> list[str]:
    numbers = [
        f"{site.d_in:,}",
        f"{site.d_out:,}",
        f"{site.n}",
        _listed(site.r),
        f"{site.rank}",
        f"{site.parameters:,}",
    ]
    return [site.path, *numbers, _listed(site.scaling), site.mixer, site.strategy]


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
