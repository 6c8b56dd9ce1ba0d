"""The results of an evaluation: a table for the screen, and results.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table

import melora_jax as mj
from train.report.tables import terminal_table
from train.run_folder.log import replace_text

_PACKAGES = ("lm_eval", "jax", "jaxlib", "flax", "transformers", "datasets", "numpy")


@dataclasses.dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
      settings: the command's options.
      adapter: facts about the adapter; None without one.
      found: what `lm_eval.evaluator.evaluate` returned.
      shortened: how many requests lost their first tokens.
      seconds: of the evaluation, without loading.
    """

    settings: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    found: Mapping[str, Any]
    shortened: int
    seconds: float


class Score(NamedTuple):
    """One row of the table; `error` is the standard error, or None."""

    task: str
    metric: str
    value: float
    error: float | None


def scores(report: Report) -> Iterator[Score]:
    """Each task's and group's metrics; a metric of filtered answers is followed by the filter's name."""
    tables = {**report.found["results"], **report.found.get("groups", {})}
    for task, values in tables.items():
        for key, value in values.items():
            metric, _, chain = key.partition(",")
            if not chain or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chain}")
            known = isinstance(error, int | float) and not math.isnan(error)
            yield Score(task, metric if chain == "none" else f"{metric} ({chain})", value, error if known else None)


def results_table(report: Report) -> Table:
    """Task, shots, rows, metric, value and standard error."""
    shots, counts = report.found["n-shot"], report.found["n-samples"]
    rows = []
    for task, metric, value, error in scores(report):
        shown = str(shots.get(task, "")), f"{counts[task]['effective']:,}" if task in counts else ""
        rows.append([task, *shown, metric, f"{value:.4f}", "" if error is None else f"± {error:.4f}"])
    return terminal_table(("task", "shots", "rows", "metric", "value", "stderr"), rows, text_columns=(0, 3))


def write_results(report: Report, folder: Path) -> Path:
    """Writes results.json, and samples.jsonl if samples were asked for; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    if "samples" in report.found:
        lines = [
            json.dumps({"task": task} | sample, default=str, ensure_ascii=False)
            for task, samples in report.found["samples"].items()
            for sample in samples
        ]
        replace_text(folder / "samples.jsonl", "\n".join(lines) + "\n")
    path = folder / "results.json"
    replace_text(path, json.dumps(_as_json(report), indent=2, default=str) + "\n")
    return path


def _as_json(report: Report) -> dict[str, Any]:
    found = report.found
    tasks: dict[str, Any] = {}
    for task, metric, value, error in scores(report):
        tasks.setdefault(task, {})[metric] = {"value": value, "stderr": error}
    versions = {"melora_jax": mj.__version__} | {name: version(name) for name in _PACKAGES}
    return {
        "scores": tasks,
        "settings": report.settings,
        "adapter": report.adapter,
        "shots": found["n-shot"],
        "rows": found["n-samples"],
        "task_versions": found["versions"],
        "requests_shortened": report.shortened,
        "seconds": round(report.seconds, 1),
        "versions": versions | {"backend": jax.default_backend()},
    }
