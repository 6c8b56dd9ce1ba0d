"""The figures of the studies, as PNG files: scores over n, r, rank and parameters, and what rank was really used."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from train.lab.tables.results import Result
from train.lab.tables.studies import STUDIES, Curve, Study, curves
from train.report.figures import INK, look, new_figure, png_from_figure, short_number
from train.run_folder.log import replace_bytes

_PANEL = (340, 280)  # pixels
_MOST_COLUMNS = 4


def draw_studies(folder: Path, results: Sequence[Result]) -> dict[str, str]:
    """Draws whatever the results allow; file name → what it shows, in the page's order."""
    drawn: dict[str, str] = {}
    for study in STUDIES:
        if found := curves(study, results):
            panel = functools.partial(_curves, study=study, found=found)
            _draw(folder / f"{study.name}.png", results, panel)
            drawn[f"{study.name}.png"] = study.title
    adapted = [row for row in results if row.parameters]
    if adapted:
        _draw(folder / "score_by_parameters.png", results, lambda axes, task: _pareto(axes, task, results))
        drawn["score_by_parameters.png"] = "Score over trained adapter parameters; the line is the Pareto front"
        _draw(folder / "score_by_rank.png", results, lambda axes, task: _by_rank(axes, task, adapted))
        drawn["score_by_rank.png"] = "Score over the rank that the update can have"
        _draw(folder / "effective_rank.png", results, lambda axes, task: _effective(axes, task, adapted))
        drawn["effective_rank.png"] = "Effective rank of the trained updates over the rank they can have"
    return drawn


def _draw(path: Path, results: Sequence[Result], panel: Callable[[Axes, str], None]) -> None:
    """One panel a task, side by side."""
    tasks = list(dict.fromkeys(row.task for row in results))
    columns = min(len(tasks), _MOST_COLUMNS)
    lines = math.ceil(len(tasks) / columns)
    with new_figure(_PANEL[0] * columns, _PANEL[1] * lines) as figure:
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in panels[len(tasks) :]:
            axes.set_axis_off()
        for axes, task in zip(panels, tasks, strict=False):
            axes.set_title(task)
            panel(axes, task)
        replace_bytes(path, png_from_figure(figure))


def _curves(axes: Axes, task: str, study: Study, found: Sequence[Curve]) -> None:
    drawn = [curve for curve in found if curve.task == task]
    for number, curve in enumerate(drawn):
        x = [study.x(row) for row in curve.rows]
        _points(axes, x, curve.rows, number, curve.label, line=True)
    _logarithmic(axes, sorted({study.x(row) for curve in drawn for row in curve.rows}))
    axes.set_xlabel({"n": "minis n", "r": "rank r of a mini"}[study.symbol])
    _finish(axes, drawn[0].rows if drawn else ())


def _by_rank(axes: Axes, task: str, rows: Sequence[Result]) -> None:
    own = [row for row in rows if row.task == task]
    for number, row in enumerate(own):
        _points(axes, [row.rank], [row], number, row.word)
    _logarithmic(axes, sorted({row.rank for row in own}))
    axes.set_xlabel("rank of the update, at most")
    _finish(axes, own)


def _pareto(axes: Axes, task: str, rows: Sequence[Result]) -> None:
    own = sorted((row for row in rows if row.task == task), key=lambda row: row.parameters)
    front = [row for number, row in enumerate(own) if all(row.score.mean > less.score.mean for less in own[:number])]
    axes.plot([row.parameters for row in front], [row.score.mean for row in front], color=INK, linewidth=1.0, zorder=0)
    for number, row in enumerate(own):
        _points(axes, [row.parameters], [row], number, row.word)
    least = min((row.parameters for row in own if row.parameters), default=1)
    axes.set_xscale("symlog", linthresh=least)
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.set_xlabel("adapter parameters")
    _finish(axes, own)


def _effective(axes: Axes, task: str, rows: Sequence[Result]) -> None:
    own = [row for row in rows if row.task == task]
    largest = max((row.rank for row in own), default=1)
    axes.plot([1, largest], [1, largest], "--", color=INK, linewidth=1.0, zorder=0)
    for number, row in enumerate(own):
        style = look(number)
        axes.plot([row.rank], [row.effective or 0.0], style.marker, color=style.colour, label=row.word)
    _logarithmic(axes, sorted({row.rank for row in own}))
    axes.set_xlabel("rank of the update, at most")
    axes.set_ylabel("effective rank")
    if own:
        axes.legend()


def _points(
    axes: Axes, x: Sequence[int], rows: Sequence[Result], number: int, label: str, *, line: bool = False
) -> None:
    """Scores with their intervals, in the look of the series `number`."""
    style = look(number)
    axes.errorbar(
        x,
        [row.score.mean for row in rows],
        yerr=[0.0 if math.isnan(row.score.half) else row.score.half for row in rows],
        marker=style.marker,
        color=style.colour,
        linestyle=style.line if line else "none",
        elinewidth=1.0,
        capsize=3,
        label=label,
    )


def _logarithmic(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(map(float, ticks))))
    axes.xaxis.set_major_formatter(FixedFormatter(list(map(str, ticks))))
    axes.xaxis.set_minor_locator(NullLocator())


def _finish(axes: Axes, rows: Sequence[Result]) -> None:
    if rows:
        axes.set_ylabel(rows[0].metric)
        axes.legend()
