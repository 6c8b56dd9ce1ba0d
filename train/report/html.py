"""HTML pages by jinja2: templates that escape whatever comes from a run, and the colours of pages and figures.

A page has no script, no link and no font of its own, and its content security policy forbids scripts and requests. Only
`Markup` enters a page unescaped: the drawings of `train.report.figures`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

LIGHT = {
    "page": "#f5f5f2",
    "card": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59636e",
    "rule": "#e3e3de",
    "band": "#f0f0ec",
    "series-0": "#1f62a8",
    "series-1": "#c04d08",
    "series-2": "#0c7a58",
    "series-3": "#8a3fa0",
    "series-4": "#836400",
    "series-5": "#4c5662",
}
"""The light theme: the colours of the style sheet's variables and of figures."""

DARK = {
    "page": "#14171a",
    "card": "#1c2024",
    "ink": "#e7e9ea",
    "muted": "#a3adb7",
    "rule": "#33393f",
    "band": "#262b30",
    "series-0": "#6fb1f2",
    "series-1": "#f59b5e",
    "series-2": "#52cda2",
    "series-3": "#d49ce6",
    "series-4": "#dfbf58",
    "series-5": "#aab3bd",
}

SERIES_COLOURS = sum(name.startswith("series-") for name in LIGHT)

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **values: Any) -> str:
    """A page from a file of `templates/`; every value is escaped unless it is `Markup`."""
    return _TEMPLATES.get_template(template).render(light=LIGHT, dark=DARK, **values)
