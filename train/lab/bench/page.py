"""The bench's tables: on the screen, and in a Markdown page whose prose stays as it is.

In the page a line `<!-- bench NAME.json -->` begins what is written from that file, and `<!-- end -->` ends it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from train.lab.bench.plot import plot_path
from train.lab.bench.record import Record, Row, Run, load
from train.report.tables import markdown_table, terminal_table
from train.run_folder.log import replace_text

HEADERS = (
    "step",
    "ms",
    "times the first",
    "tokens/s",
    "model GFLOP/s",
    "MFU",
    "XLA plan MB",
    "trace s",
    "compile s",
    "HLO lines",
)
COMPILE_HEADERS = ("layers", "", "trace s", "compile s", "HLO lines")
_BLOCK = re.compile(r"(<!-- bench (\S+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def heading(record: Record) -> str:
    """What a record measures: model, task, rows, dtype and adapted layers."""
    subject = record.subject
    model = subject["model"] or f"random weights {subject['width']} wide, {subject['depth']} layers"
    rows = f"{subject['batch_size']} x {subject['length']} tokens, {subject['dtype']}"
    return f"{model}, {subject['task']}, {rows}, adapted: {', '.join(subject['targets'])}"


def cells_of(record: Record, row: Row, device: str) -> list[str]:
    """A row's cells, under `HEADERS`."""
    facts, used = row.facts, record.utilisation(row, device)
    chosen = f" ({facts['strategy']})" if facts["strategy"] and facts["strategy"] not in row.name else ""

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    return [
        f"{row.name}{chosen}",
        f"{1e3 * row.median:.1f}",
        f"{record.ratio(row):.3f}",
        f"{record.tokens / row.median:,.0f}",
        cell(record.flops_per_second(row), ",.0f", 1e-9),
        cell(used, ".1%"),
        cell(facts["planned_bytes"], ",.0f", 1e-6),
        cell(facts["trace_seconds"], ".1f"),
        cell(facts["compile_seconds"], ".1f"),
        cell(facts["hlo_lines"], ",.0f"),
    ]


def compile_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table of compilations, under `COMPILE_HEADERS`."""
    seconds = [f"{row[name]:.1f}" for name in ("trace_seconds", "compile_seconds")]
    return [str(row["depth"]), "stacked" if row["stacked"] else "one by one", *seconds, f"{row['hlo_lines']:,}"]


def tables(run: Run) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """Each table's heading, headers and cells; empty columns are left out."""
    found = []
    for record in run.records:
        rows = [cells_of(record, row, run.machine["device"]) for row in record.rows]
        headers: tuple[str, ...] = HEADERS
        if any(row.peak_bytes for row in record.rows):
            peaks = (f"{row.peak_bytes / 1e6:,.0f}" if row.peak_bytes else "-" for row in record.rows)
            rows, headers = [[*cells, peak] for cells, peak in zip(rows, peaks, strict=True)], (*headers, "peak MB")
        used = [place for place in range(len(headers)) if any(cells[place] != "-" for cells in rows)]
        picked = [[cells[place] for place in used] for cells in rows]
        found.append((heading(record), tuple(headers[place] for place in used), picked))
    if run.compiles:
        title = "Training step of a Llama-2-7B by number of layers, bfloat16, remat full, compiled from shapes"
        found.append((title, COMPILE_HEADERS, [compile_cells(row) for row in run.compiles]))
    return found


def screen_tables(run: Run) -> list[Table]:
    """The tables for the screen."""
    return [terminal_table(headers, rows, title=title) for title, headers, rows in tables(run)]


def markdown(run: Run, figure: str | None) -> str:
    """A run's tables, machine and figure."""
    parts = [f"### {run.title}", _machine(run.machine)]
    for title, headers, rows in tables(run):
        parts += [f"{title}:", markdown_table(headers, rows)]
    if figure:
        parts.append(f"![{run.title}]({figure})")
    return "\n\n".join(parts) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    return f"{machine['date']}: {machine['device']} ({machine['processor']}), {machine['system']}, {versions}."


def write_page(page: Path, results: Path, say: Callable[[str], None]) -> None:
    """Writes the tables of each result that a page names between its marks.

    Raises:
      ValueError: the page has no marks, or a file that it names is not a result.
      FileNotFoundError: the page, or a file that it names, is not there.
    """
    text = page.read_text()
    if not _BLOCK.search(text):
        raise ValueError(f"{page} has no place for a result; write <!-- bench NAME.json --> and <!-- end --> into it")

    def filled(block: re.Match[str]) -> str:
        path = results / block[2]
        if not path.exists():
            raise FileNotFoundError(
                f"{page} names {block[2]}, which is not in {results}; run the bench with --out {path}"
            )
        picture = plot_path(path)
        figure = picture.relative_to(page.parent).as_posix() if picture.is_relative_to(page.parent) else None
        return f"{block[1]}\n{markdown(load(path), figure if picture.exists() else None)}\n{block[3]}"

    replace_text(page, _BLOCK.sub(filled, text))
    say(f"{page} is written")
