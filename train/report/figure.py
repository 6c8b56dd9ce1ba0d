"""How a figure looks: matplotlib set up to draw inline SVG in the page's colours and font, the same bytes each time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from train.report.html import SERIES_COLOURS, Html, element

# Colours that stand for CSS variables: matplotlib draws them, `svg_from_figure` writes the variable in their place.
INK, RULE, BAND = "#010101", "#020202", "#030303"
_VARIABLES = {INK: "--muted", RULE: "--rule", BAND: "--band"}
_VARIABLES |= {f"#0400{index:02x}": f"--series-{index}" for index in range(SERIES_COLOURS)}

_DASHES = ((), (6, 3), (2, 2), (8, 2, 2, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_MARKER_SIGNS = "●■▲◆▼✚"
_PIXELS = 72.0  # matplotlib writes SVG in points; one point is one pixel of the page

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
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclasses.dataclass(frozen=True)
class Look:
    """How one series of a figure is told apart, in the drawing and in the legend beside it."""

    colour: str
    variable: str
    dashes: tuple[int, ...]
    marker: str
    sign: str


def look(index: int) -> Look:
    """The look of a figure's series number `index`: colours and markers first, then other dashes too."""
    colour, marker = index % SERIES_COLOURS, index % len(_MARKERS)
    dashes = _DASHES[index // SERIES_COLOURS % len(_DASHES)]
    return Look(f"#0400{colour:02x}", f"var(--series-{colour})", dashes, _MARKERS[marker], _MARKER_SIGNS[marker])


def short_number(value: float, _position: int | None = None) -> str:
    """A tick's label.

    >>> short_number(100000.0), short_number(0.02)
    ('100k', '0.02')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def log_locator(low: float, high: float) -> Locator:
    """Few ticks for a logarithmic axis: decades, with 2 and 5 on a short one, and even steps within one decade."""
    decades = math.log10(high / low)
    if decades < 1.0:
        return MaxNLocator(nbins=4)
    return LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0), numticks=8)


@contextlib.contextmanager
def new_figure(width: int, height: int) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many pixels in the page's style, without pyplot's global state."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own matplotlibrc must not change a report
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width / _PIXELS, height / _PIXELS))
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def svg_from_figure(figure: Figure, name: str, describe: str) -> Html:
    """The figure as an <svg> element whose ids start with `name` and whose colours follow the page's theme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") : svg.rindex("</svg>")]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # The page's font, however this matplotlib writes its own: as one property or as two.
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*; ", "", svg)
    width, height = (round(inches * _PIXELS) for inches in figure.get_size_inches())
    attributes = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria_label": describe}
    drawing = element("svg", Html(svg[svg.index(">") + 1 :]), **attributes, style=f"min-width:{width * 4 // 5}px")
    return element("div", drawing, class_="scroll", tabindex="0")
