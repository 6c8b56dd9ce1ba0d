"""`python -m train study`: the page, the figures and the data of a table, finished or in part."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.lab.tables.figures import draw_studies
from train.lab.tables.results import Result, read_manifest, read_results
from train.lab.tables.scores import LEVEL
from train.lab.tables.studies import STUDIES, curves
from train.report.tables import markdown_table
from train.run_folder.folder import read_run
from train.run_folder.log import replace_text

PAGE, DATA = "results.md", "results.json"


def study(words: Sequence[str]) -> int:
    """Writes the page of each table folder; returns the exit code."""
    if not words:
        raise ValueError("which table? give the folder of `python -m train glue`, e.g. python -m train study runs/glue")
    for word in words:
        print(write_study(Path(word)))
    return 0


def write_study(folder: Path) -> Path:
    """Writes results.md, results.json and the figures into a table's folder; the page's path.

    Raises:
      ValueError: no table there, or none of its rows is finished.
    """
    manifest, results = read_manifest(folder), read_results(folder)
    if not results:
        raise ValueError(f"no row of the table in {folder} is finished; continue with: {manifest['command']}")
    drawn = draw_studies(folder, results)
    replace_text(folder / DATA, json.dumps(_data(manifest["reference"], results), indent=2) + "\n")
    missing = len(manifest["rows"]) - len(results)
    versions = read_run(_first_run(folder, manifest["rows"], results)).versions
    lines = [
        "# Results",
        "",
        f"Command: `{manifest['command']}`",
        "",
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        "",
        *_explain(results, missing),
        *_table(results, manifest["reference"]),
        *_verdicts(results, manifest["reference"]),
        *_findings(results),
        *(line for name, title in drawn.items() for line in ("", f"## {title}", "", f"![{title}]({name})")),
    ]
    replace_text(folder / PAGE, "\n".join(lines) + "\n")
    return folder / PAGE


def _first_run(folder: Path, rows: Sequence[dict], results: Sequence[Result]) -> Path:
    entry = next(row for row in rows if (row["task"], row["word"]) == (results[0].task, results[0].word))
    return folder / entry["folder"] / next(iter(entry["seeds"].values()))


def _explain(results: Sequence[Result], missing: int) -> Iterator[str]:
    yield (
        f"Scores are those after the last step, on the held-out rows: mean ± half a {LEVEL:.0%} interval over seeds "
        "(Student's t). Beside them, the best evaluation of each run, the paper's optimistic score. "
        "Learning rates were chosen for each method by one run for each rate, on held-back training rows and never on "
        "the reported ones; * marks a rate at the edge of those tried. Intervals are not corrected for many rows."
    )
    if missing:
        yield ""
        yield f"**Of the table's rows, {missing} are not finished and not shown.**"
    yield ""


def _table(results: Sequence[Result], reference: str) -> Iterator[str]:
    headers = ["task", "method", "parameters", "rank", "eff. rank", "lr", "seeds", "score", "best", "− reference"]
    rows = []
    for row in results:
        other = _reference(results, row.task, reference)
        change = "-" if other is None or other is row else f"{row.against(other).interval}"
        cells = [
            f"{row.task} ({row.metric})",
            row.word,
            f"{row.parameters:,}",
            str(row.rank or "-"),
            "-" if row.effective is None else f"{row.effective:.1f}",
            f"{row.rate:.2g}{'*' if row.at_edge else ''}",
            str(len(row.last)),
            str(row.score),
            str(row.best_score),
            change,
        ]
        rows.append(cells)
    yield markdown_table(headers, rows, text_columns=(0, 1))
    yield ""


def _verdicts(results: Sequence[Result], reference: str) -> Iterator[str]:
    """Who wins, ties and loses against the reference, a line a task."""
    for task in dict.fromkeys(row.task for row in results):
        other = _reference(results, task, reference)
        if other is None:
            continue
        verdicts: dict[str, list[str]] = {}
        for row in results:
            if row.task == task and row is not other:
                verdicts.setdefault(row.against(other).verdict, []).append(row.word)
        said = "; ".join(f"{verdict}: {', '.join(words)}" for verdict, words in verdicts.items())
        yield f"- {task}, against {reference} at the same seeds: {said or 'nothing to compare'}."
    yield ""


def _findings(results: Sequence[Result]) -> Iterator[str]:
    for one in STUDIES:
        found = curves(one, results)
        if found:
            yield f"{one.title}:"
            yield ""
            yield from (f"- {curve.finding(one)}." for curve in found)
            yield ""


def _reference(results: Sequence[Result], task: str, word: str) -> Result | None:
    return next((row for row in results if (row.task, row.word) == (task, word)), None)


def _data(reference: str, results: Sequence[Result]) -> list[dict]:
    """The rows with everything computed from them; the interval of a single seed is null."""
    rows = []
    for row in results:
        other = _reference(results, row.task, reference)
        entry = dataclasses.asdict(row)
        entry["score"], entry["best_score"] = (_plain(one.mean, one.half) for one in (row.score, row.best_score))
        if other is not None:
            change = row.against(other)
            entry["against_reference"] = _plain(change.interval.mean, change.interval.half) | {
                "verdict": change.verdict
            }
        rows.append(entry)
    return rows


def _plain(mean: float, half: float) -> dict:
    return {"mean": mean, "half": None if math.isnan(half) else half}
