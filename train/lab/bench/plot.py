"""The bench's figure: each record's steps over the frozen limit; in a sweep, as curves over what varies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes

from train.lab.bench.record import Record, Run, is_limit
from train.report.figures import INK, look, new_figure, png_from_figure

_FORMATS: dict[str, Callable[[Record], str]] = {
    "tokens": lambda record: f"{record.tokens}",
    "width": lambda record: f"{record.subject['width']}",
    "depth": lambda record: f"{record.subject['depth']}",
}
_RATIO = "time over the frozen limit's"


def png_of(run: Run) -> bytes:
    """The figure as a PNG."""
    with new_figure(640, 90 + 26 * max(8, len(run.records[0].rows))) as figure:
        axes = figure.add_subplot()
        (_curves if len(run.records) > 1 else _bars)(axes, run)
        axes.set_title(f"{run.title} · {run.machine['device']}")
        return png_from_figure(figure)


def _bars(axes: Axes, run: Run) -> None:
    record = run.records[0]
    rows = record.rows[::-1]
    bars = axes.barh([row.name for row in rows], [record.ratio(row) for row in rows], color=look(0).colour)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.axvline(1.0, color=INK, linewidth=1)
    axes.grid(visible=False)
    axes.set_xlabel(_RATIO)


def _curves(axes: Axes, run: Run) -> None:
    """A curve a step; a point a record."""
    places = [_place(record, run.sweep) for record in run.records]
    names = dict.fromkeys(row.name for record in run.records for row in record.rows if not is_limit(row))
    for number, name in enumerate(names):
        found = {
            place: record.ratio(row)
            for place, record in zip(places, run.records, strict=True)
            for row in record.rows
            if row.name == name
        }
        style = look(number)
        axes.plot(
            list(found),
            list(found.values()),
            marker=style.marker,
            color=style.colour,
            linestyle=style.line,
            label=name,
        )
    axes.axhline(1.0, color=INK, linewidth=1)
    axes.set_xlabel(", ".join(run.sweep))
    axes.set_ylabel(_RATIO)
    axes.legend()


def _place(record: Record, sweep: list[str]) -> str:
    return ", ".join(_FORMATS[name](record) for name in sweep)


def plot_path(path: Path) -> Path:
    """The figure of a result: beside it, under its name."""
    return path.with_suffix(".png")
