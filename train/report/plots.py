"""The report's figures: curves over steps, spectra, scores over parameters, and their legends.

A figure holds numbers and fixed words alone. Text that comes from a run (labels, paths, metric names) stands
in the HTML around it, where it is escaped, wraps, and needs no font of matplotlib's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from melora_jax.core import FLOAT32_RANK_TOLERANCE
from train.report.figure import BAND, INK, log_locator, look, new_figure, short_number, svg_from_figure
from train.report.html import Html, element
from train.run_folder.log import Event

MOST_POINTS = 400
LOSS_WEIGHT = 0.9
LOSS_NOTE = f"The training loss is an exponential mean, weight {LOSS_WEIGHT:g}, of the logged values; those are faint."
"""What a figure with `loss_series` says beneath it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. `colour` counts the figure's series; `faint` draws it as background, `dots` marks each point."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dots: bool = False


def curves(name: str, describe: str, series: Sequence[Series], y_label: str, height: int = 260) -> Html:
    """Curves over training steps.

    Args:
      name: unique on the page; it prefixes the SVG's ids.
      describe: what a screen reader says.
      series: the curves; values that are not finite leave gaps.
      y_label: the vertical axis, a fixed word.
      height: pixels.
    """
    with new_figure(760, height) as (figure, axes):
        for one in series:
            style = look(one.colour)
            line = axes.plot(one.x, _gapped(one.y), color=style.colour)[0]
            line.set_linestyle((0, style.dashes) if style.dashes else "-")
            if one.faint:
                line.set(linewidth=1.0, alpha=0.35)
            if one.dots:
                line.set_marker(style.marker)
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        axes.set_title(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        return svg_from_figure(figure, name, describe)


def spectrum(name: str, describe: str, spectra: Mapping[int, np.ndarray], rank: int, width: int = 370) -> Html:
    """Singular values on a logarithmic axis, largest first, and where the rank `rank` ends.

    Args:
      name: unique on the page.
      describe: what a screen reader says.
      spectra: number of the series → its values, descending; those that count as zero are not drawn.
      rank: a line marks it, and the band right of it holds zeros.
      width: pixels.
    """
    with new_figure(width, 230) as (figure, axes):
        for index, values in spectra.items():
            drawn = values[values > FLOAT32_RANK_TOLERANCE * values.max()]
            style = look(index)
            size = 6.0 if len(drawn) <= 16 else 4.0 if len(drawn) <= 64 else 3.0
            axes.plot(np.arange(1, len(drawn) + 1), drawn, style.marker, color=style.colour, markersize=size)
        axes.set_yscale("log")
        end = rank + max(1.5, 0.3 * rank)
        axes.set_xlim(0.5 - 0.02 * rank, end)
        axes.axvspan(rank + 0.5, end, color=BAND, linewidth=0)
        axes.axvline(rank + 0.5, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.text((rank + 0.5 + end) / 2, 0.5, "zero", transform=axes.get_xaxis_transform(), ha="center", va="center")
        axes.set_xlabel("singular value, by size")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, prune="upper"))
        axes.yaxis.set_major_locator(log_locator(*axes.get_ylim()))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        axes.yaxis.set_minor_locator(NullLocator())
        return svg_from_figure(figure, name, describe)


def score_by_parameters(name: str, describe: str, points: Mapping[int, tuple[int, float]]) -> Html:
    """Scores over adapter parameters on a logarithmic axis with 0: number of the series → (parameters, score)."""
    with new_figure(760, 260) as (figure, axes):
        for index, (parameters, score) in points.items():
            style = look(index)
            axes.plot([parameters], [score], style.marker, color=style.colour, markersize=10.0)
        sizes = [parameters for parameters, _ in points.values() if parameters] or [1000]
        decades = range(int(math.log10(min(sizes))), math.ceil(math.log10(max(sizes))) + 1)
        axes.set_xscale("symlog", linthresh=10.0 ** decades[0], linscale=0.7)
        axes.set_xlim(-0.3 * 10.0 ** decades[0], 1.5 * 10.0 ** decades[-1])
        axes.xaxis.set_major_locator(FixedLocator([0.0, *(10.0**decade for decade in decades)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.15)
        axes.set_xlabel("trainable adapter parameters")
        axes.set_title("score")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        return svg_from_figure(figure, name, describe)


def legend(labels: Mapping[int, str], markers: bool = False) -> Html:
    """The key to a figure: number of the series → label, each after its line or, where asked, its marker."""
    items = []
    for index, label in labels.items():
        style = look(index)
        if markers:
            sign = element("span", style.sign, style=f"color:{style.variable}")
        else:
            dashes = " ".join(map(str, style.dashes))
            ends = {"x1": "1", "y1": "5", "x2": "27", "y2": "5"}
            line = element("line", **ends, stroke_dasharray=dashes, style=f"stroke:{style.variable}")
            sign = element("svg", line, viewBox="0 0 28 10", aria_hidden="true")
        items.append(element("li", sign, label))
    return element("ul", *items, class_="legend")


def metric_series(events: Sequence[Event], name: str, colour: int = 0, dots: bool = True) -> Series:
    """One logged number over steps, from the events that have it."""
    logged = [event for event in events if name in event]
    x, y = ([float(event[key]) for event in logged] for key in ("step", name))
    return Series(x=x, y=y, colour=colour, dots=dots)


def loss_series(steps: Sequence[Event], colour: int = 0) -> tuple[Series, Series]:
    """The training loss as it was logged, faint, and its exponential mean; of many values, `thinned` ones."""
    logged = metric_series(steps, "loss", colour, dots=False)
    x, y = thinned(logged.x), thinned(logged.y)
    return Series(x=x, y=y, colour=colour, faint=True), Series(x=x, y=_smoothed(y), colour=colour)


def thinned(values: Sequence[float]) -> list[float]:
    """`values`, or where there are more than `MOST_POINTS`, the means of so many equal groups (finite values only).

    >>> thinned([1.0, 2.0, 3.0])
    [1.0, 2.0, 3.0]
    """
    group = -(-len(values) // MOST_POINTS) or 1
    return [_mean(values[start : start + group]) for start in range(0, len(values), group)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _smoothed(values: Sequence[float]) -> list[float]:
    """The exponential mean, corrected for its start; a value that is not finite leaves a gap and no trace."""
    mean = weight = 0.0
    smooth = []
    for value in values:
        if math.isfinite(value):
            mean, weight = LOSS_WEIGHT * mean + value, LOSS_WEIGHT * weight + 1.0
        smooth.append(mean / weight if math.isfinite(value) else math.nan)
    return smooth


def _gapped(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)
