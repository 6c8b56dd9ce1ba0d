"""Figures in one style: matplotlib set up once, the report's plots, and the key beside each.

A report's figure holds numbers and fixed words only. Text that comes from a run (labels, paths, metric names) stands in
the HTML around it, where it is escaped, wraps, and needs no font of matplotlib's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from melora_jax.core import FLOAT32_RANK_TOLERANCE
from train.report.html import LIGHT, SERIES_COLOURS
from train.run_folder.log import Event

INK, RULE, BAND = LIGHT["muted"], LIGHT["rule"], LIGHT["band"]
MOST_POINTS = 400
LOSS_WEIGHT = 0.9
LOSS_NOTE = f"The training loss is an exponential mean, weight {LOSS_WEIGHT:g}, of the logged values; those are faint."
"""What a page says beneath a plot of `loss_series`."""

_DASHES = ((), (6, 3), (2, 2), (8, 2, 2, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MARKER_SIGNS = "●■▲◆▼✚"
_PIXELS = 72.0  # matplotlib writes SVG in points; one point is one pixel of the page
_PNG_SCALE = 2  # dots of a PNG for each pixel

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "path.simplify": False,
    "svg.hashsalt": "melora_jax",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.0,
    "axes.titlecolor": INK,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": RULE,
    "grid.linewidth": 1.0,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0.0,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclasses.dataclass(frozen=True)
class Look:
    """How one series of a figure is told apart, in the drawing and in the key beside it.

    Attributes:
      colour: in the light theme; `variable` is the style sheet's, which follows the theme.
      dashes: lengths of dashes and gaps in pixels; empty for a solid line.
      marker: matplotlib's; `sign` is the character like it.
    """

    colour: str
    variable: str
    dashes: tuple[int, ...]
    marker: str
    sign: str

    @property
    def line(self) -> Any:
        """The line style, as matplotlib takes it."""
        return (0, self.dashes) if self.dashes else "-"


def look(index: int) -> Look:
    """The look of a figure's series number `index`: colours and markers change first, then dashes and their pairing."""
    group, colour = divmod(index, SERIES_COLOURS)
    marker = (colour + group) % len(_MARKERS)
    name = f"series-{colour}"
    return Look(LIGHT[name], f"var(--{name})", _DASHES[group % len(_DASHES)], _MARKERS[marker], _MARKER_SIGNS[marker])


def short_number(value: float, _position: int | None = None) -> str:
    """A tick's label.

    >>> short_number(100000.0), short_number(0.02)
    ('100k', '0.02')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


@contextlib.contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in pixels, whose style holds until the context ends; pyplot's global state is not used."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change a report
        matplotlib.rcParams.update(_STYLE)
        yield Figure(figsize=(width / _PIXELS, height / _PIXELS))


def svg_from_figure(figure: Figure, name: str, describe: str) -> Markup:
    """The figure as an <svg> element whose ids start with `name` and whose colours follow the page's theme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") : svg.rindex("</svg>")]
    for variable, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # The page's font, however this matplotlib writes its own: as one property or as two.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    width, height = (round(inches * _PIXELS) for inches in figure.get_size_inches())
    frame = Markup(
        '<div class="scroll" tabindex="0"><svg viewBox="0 0 {} {}" role="img" aria-label="{}" style="min-width:{}px">'
        "{}</svg></div>"
    )
    return frame.format(width, height, describe, width * 4 // 5, Markup(svg[svg.index(">") + 1 :]))


def png_from_figure(figure: Figure) -> bytes:
    """The figure as a PNG in the light theme, the same bytes each time."""
    buffer = io.BytesIO()
    dpi = _PNG_SCALE * _PIXELS
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=LIGHT["card"], metadata={"Software": None})
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawing and its key: (look, label) of each series, shown by its markers or by its line."""

    drawing: Markup
    entries: Sequence[tuple[Look, str]] = ()
    markers: bool = False


def plot(drawing: Markup, labels: Mapping[int, str], markers: bool = False) -> Plot:
    """A drawing with its key: number of the series → label."""
    return Plot(drawing, [(look(index), label) for index, label in labels.items()], markers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. `colour` counts the figure's series; `faint` draws it as background, `dots` marks each point."""

    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    dots: bool = False


def curves(name: str, describe: str, series: Sequence[Series], y_label: str, height: int = 260) -> Markup:
    """Curves over training steps.

    Args:
      name: unique on the page; it prefixes the SVG's ids.
      describe: what a screen reader says.
      series: the curves; values that are not finite leave gaps.
      y_label: the vertical axis, a fixed word.
      height: pixels.
    """
    with new_figure(760, height) as figure:
        axes = figure.add_subplot()
        for one in series:
            style = look(one.colour)
            line = axes.plot(one.x, _gapped(one.y), color=style.colour, linestyle=style.line)[0]
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


def spectrum(name: str, describe: str, spectra: Mapping[int, np.ndarray], rank: int, width: int = 370) -> Markup:
    """Singular values on a logarithmic axis, largest first, and where the rank `rank` ends.

    Args:
      name: unique on the page.
      describe: what a screen reader says.
      spectra: number of the series → its values, descending; those that count as zero are not drawn.
      rank: a line marks it, and the band right of it holds zeros.
      width: pixels.
    """
    with new_figure(width, 230) as figure:
        axes = figure.add_subplot()
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
        axes.yaxis.set_major_locator(_log_locator(*axes.get_ylim()))
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        axes.yaxis.set_minor_locator(NullLocator())
        return svg_from_figure(figure, name, describe)


def score_by_parameters(name: str, describe: str, points: Mapping[int, tuple[int, float]]) -> Markup:
    """Scores over adapter parameters on a logarithmic axis with 0: number of the series → (parameters, score)."""
    with new_figure(760, 260) as figure:
        axes = figure.add_subplot()
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


def metric_series(events: Sequence[Event], name: str, colour: int = 0, dots: bool = True) -> Series:
    """One logged number over steps, from the events that have it."""
    logged = [event for event in events if name in event]
    x, y = ([float(event[key]) for event in logged] for key in ("step", name))
    return Series(x=x, y=y, colour=colour, dots=dots)


def loss_series(steps: Sequence[Event], colour: int = 0) -> tuple[Series, Series]:
    """The training loss as it was logged, faint, and its exponential mean; a long log is `thinned` first."""
    logged = metric_series(steps, "loss", colour, dots=False)
    x, y = thinned(logged.x), thinned(logged.y)
    return Series(x=x, y=y, colour=colour, faint=True), Series(x=x, y=_smoothed(y), colour=colour)


def thinned(values: Sequence[float]) -> list[float]:
    """`values`, or, of more than `MOST_POINTS`, the means of at most that many equal groups (finite values only).

    >>> thinned([1.0, 2.0, 3.0])
    [1.0, 2.0, 3.0]
    """
    group = -(-len(values) // MOST_POINTS) or 1
    return [_mean(values[start : start + group]) for start in range(0, len(values), group)]


def _log_locator(low: float, high: float) -> Locator:
    """Few ticks for a logarithmic axis: decades, with 2 and 5 on a short one, and even steps within one decade."""
    decades = math.log10(high / low)
    if decades < 1.0:
        return MaxNLocator(nbins=4)
    return LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0), numticks=8)


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
