"""The report's HTML: elements that escape by construction, and the one style sheet. No script, no link, no font.

`element` escapes every child and attribute that is not `Html` already, so text from a run can't become markup;
the page's content security policy forbids scripts and requests besides.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

SERIES_COLOURS = 6
"""How many colours for series the style sheet has: --series-0 and on."""


class Html(str):
    """Text that is HTML already. Any other text is escaped when it enters an element."""


def element(tag: str, *children: str, **attributes: str) -> Html:
    """One element. `class_` is the attribute class; other underscores become hyphens.

    >>> element("p", "1 < 2", element("br"), class_="note")
    '<p class="note">1 &lt; 2<br></p>'
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    opening = "".join(f' {names[name]}="{html.escape(value)}"' for name, value in attributes.items())
    if tag in ("br", "meta"):
        return Html(f"<{tag}{opening}>")
    inner = "".join(child if isinstance(child, Html) else html.escape(child) for child in children)
    return Html(f"<{tag}{opening}>{inner}</{tag}>")


def card(title: str, *children: str) -> Html:
    """A section with a heading."""
    return element("section", element("h2", title), *children)


def note(text: str) -> Html:
    """A sentence that explains a figure or says what is missing."""
    return element("p", text, class_="note")


def tiles(entries: Iterable[tuple[str, str, str]]) -> Html:
    """The headline numbers: (what, value, a line of detail)."""
    return element("dl", *(_tile(*entry) for entry in entries), class_="tiles")


def _tile(what: str, value: str, detail: str) -> Html:
    return element(
        "div",
        element("dt", what),
        element("dd", value, class_="value"),
        element("dd", detail or "\u00a0", class_="detail"),
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], text_columns: Sequence[int] = (0,)) -> Html:
    """A table whose columns are right-aligned numbers, but for `text_columns`."""

    def line(tag: str, cells: Sequence[str]) -> Html:
        classes = ["text" if column in text_columns else "number" for column in range(len(cells))]
        return element("tr", *(element(tag, cell, class_=kind) for cell, kind in zip(cells, classes, strict=True)))

    body = element("tbody", *(line("td", row) for row in rows))
    return element("div", element("table", element("thead", line("th", headers)), body), class_="scroll", tabindex="0")


def folded(summary: str, content: Html, unfold: bool = False) -> Html:
    """Content behind a line that a click unfolds."""
    attributes = {"open": "open"} if unfold else {}
    return element("details", element("summary", summary), content, **attributes)


def code(text: str) -> Html:
    """Preformatted text."""
    return element("pre", text, tabindex="0")


def document(title: str, *body: Html) -> str:
    """A whole page, self-contained."""
    policy = element(
        "meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        policy,
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(_STYLE)),
    )
    page = element("html", head, element("body", element("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


_STYLE = """
:root {
  --page: #f5f5f2; --card: #ffffff; --ink: #1b1f24; --muted: #59636e; --rule: #e3e3de; --band: #f0f0ec;
  --series-0: #1f62a8; --series-1: #c04d08; --series-2: #0c7a58; --series-3: #8a3fa0; --series-4: #836400;
  --series-5: #4c5662;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --card: #1c2024; --ink: #e7e9ea; --muted: #a3adb7; --rule: #33393f; --band: #262b30;
  --series-0: #6fb1f2; --series-1: #f59b5e; --series-2: #52cda2; --series-3: #d49ce6; --series-4: #dfbf58;
  --series-5: #aab3bd;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 840px; margin: 0 auto; padding: 40px 20px 64px; }
header { margin: 0 4px 24px; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--muted); }
h1 { margin: 2px 0 4px; font-size: 28px; line-height: 1.25; font-weight: 650; letter-spacing: -0.01em; }
h2 { margin: 0 0 12px; font-size: 16px; font-weight: 650; }
h3 { margin: 0; font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
  overflow-wrap: anywhere; }
section { margin: 0 0 16px; padding: 20px 24px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
section > :last-child { margin-bottom: 0; }
.note, .legend, figcaption { margin: 0 0 12px; color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.scroll + .note { margin-top: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 1px; margin: 0 0 16px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
.tiles div { padding: 14px 18px; box-shadow: 1px 1px 0 0 var(--rule); }
.tiles dt, .tiles .detail { color: var(--muted); font-size: 13px; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 22px; line-height: 1.4; font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 7px; color: var(--ink); }
.legend svg { flex: none; width: 28px; stroke-width: 2.5; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px 24px; }
figure { margin: 0; min-width: 0; }
figcaption { margin: 0 0 4px; }
.versions { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0; font-size: 13px; }
.versions div { display: flex; gap: 7px; }
.versions dt { color: var(--muted); }
.versions dd { margin: 0; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
th, td { padding: 6px 0 6px 16px; border-bottom: 1px solid var(--rule); text-align: right; }
th:first-child, td:first-child { padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
.text { text-align: left; overflow-wrap: anywhere; }
td.text:first-child { min-width: 150px; }
.number { white-space: nowrap; }
th.number { white-space: normal; }
summary { cursor: pointer; color: var(--muted); font-size: 13px; }
details[open] > summary { margin-bottom: 8px; }
pre { margin: 0 0 12px; padding: 12px 14px; overflow-x: auto; background: var(--band); border-radius: 6px;
  font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
