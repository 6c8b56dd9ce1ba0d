"""Reads a page as a browser would: its elements, text and ids; and reads a figure's numbers back from its SVG."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np

_VOID = {"br", "meta"}


class Page(HTMLParser):
    """`tags` with their attributes, the `text` outside style, and whether every element is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], "unclosed elements"

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def attributes(self) -> list[tuple[str, str]]:
        return [(name, value or "") for _, attributes in self.tags for name, value in attributes.items()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open and data.strip():
            self.texts.append(data.strip())


def assert_self_contained(source: str) -> None:
    """No script, no request, no id twice; and a policy that would forbid the first two."""
    page = Page(source)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "image",
        "base",
        "form",
        "a",
        "foreignobject",
    }
    policies = [attributes for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    assert policies == [
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    ]
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "action")
        assert not name.endswith("href") or value.startswith("#")
    assert re.findall(r"@import|url\((?!#)", source) == []
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in page.attributes if name.endswith("href")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", source))
    assert targets <= set(ids)


def drawing(source: str, describe: str) -> str:
    """The <svg> whose label starts with `describe`."""
    (found,) = re.findall(rf'<svg[^>]*aria-label="{re.escape(describe)}[^"]*"[^>]*>(.*?)</svg>', source, re.DOTALL)
    return found


def lines(svg: str, series: int) -> list[np.ndarray]:
    """The curves [points, 2] of a series, in pixels."""
    paths = re.findall(
        rf'<path d="([^"]*)"[^>]*style="fill: none; (?:stroke-dash[^;]*; )*stroke: var\(--series-{series}\)', svg
    )
    return [np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path), dtype=np.float64) for path in paths]


def markers(svg: str, series: int) -> np.ndarray:
    """The markers [points, 2] of a series, in pixels."""
    uses = re.findall(rf'<use [^>]*x="([\d.-]+)" y="([\d.-]+)" style="fill: var\(--series-{series}\)', svg)
    return np.array(uses, dtype=np.float64)


def assert_affine(pixels: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """`pixels` are `values` on a linear axis, to a hundredth of a pixel; returns scale and origin."""
    scale, origin = np.polyfit(values, pixels, 1)
    np.testing.assert_allclose(pixels, scale * values + origin, rtol=0, atol=1e-2)
    return float(scale), float(origin)
