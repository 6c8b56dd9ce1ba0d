"""Tables of text cells: for the terminal, and in Markdown. The first column is text, the others mostly numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def terminal_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: Sequence[int] = (0,),
    title: str | None = None,
    widths: Sequence[int] | None = None,
) -> Table:
    """A table for a rich console; cells are shown as they are, brackets included.

    Args:
      headers: of the columns.
      rows: a cell for each column.
      text_columns: the columns that are aligned left; the others hold numbers and are aligned right.
      title: above the table.
      widths: of the columns; by default what the cells need. Longer cells are folded.
    """
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "header_style": "bold", "show_edge": False, "pad_edge": False}
    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), **look)
    for place, header in enumerate(headers):
        table.add_column(
            Text(header),
            justify="left" if place in text_columns else "right",
            overflow="fold",
            width=widths[place] if widths else None,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    """A table in Markdown.

    >>> print(markdown_table(["method", "score"], [["LoRA", "0.9"]]))
    | method | score |
    | --- | ---: |
    | LoRA | 0.9 |
    """
    rule = ["---" if place in text_columns else "---:" for place in range(len(headers))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))
