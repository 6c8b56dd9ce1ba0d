"""The bench's figure: each record's steps over the frozen limit; in a sweep, as curves over what varies."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.lab.bench.record import Record, Run, is_limit

_FORMATS: dict[str, Callable[[Record], str]] = {
    "tokens": lambda record: f"{record.tokens}",
    "width": lambda record: f"{record.subject['width']}",
    "depth": lambda record: f"{record.subject['depth']}",
}


def png_of(run: Run) -> bytes:
    """The figure as a PNG."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change it
        figure = Figure(figsize=(8, 1.2 + 0.32 * max(8, len(run.records[0].rows))), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        (_curves if len(run.records) > 1 else _bars)(axes, run)
        axes.set_title(f"{run.title} · {run.machine['device']}", loc="left", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _bars(axes: Axes, run: Run) -> None:
    record = run.records[0]
    rows = record.rows[::-1]
    bars = axes.barh([row.name for row in rows], [record.ratio(row) for row in rows], color="#4878a8")
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.axvline(1.0, color="#888888", linewidth=1)
    axes.set_xlabel("time over the frozen limit's")


def _curves(axes: Axes, run: Run) -> None:
    """A curve a step; a point a record."""
    places = [_place(record, run.sweep) for record in run.records]
    for name in dict.fromkeys(row.name for record in run.records for row in record.rows if not is_limit(row)):
        found = {
            place: record.ratio(row)
            for place, record in zip(places, run.records, strict=True)
            for row in record.rows
            if row.name == name
        }
        axes.plot(list(found), list(found.values()), marker="o", label=name)
    axes.axhline(1.0, color="#888888", linewidth=1)
    axes.set_xlabel(", ".join(run.sweep))
    axes.set_ylabel("time over the frozen limit's")
    axes.legend(fontsize=8)


def _place(record: Record, sweep: list[str]) -> str:
    return ", ".join(_FORMATS[name](record) for name in sweep)


def plot_path(path: Path) -> Path:
    """Where the figure of a result stands: beside it."""
    return path.with_suffix(".png")
