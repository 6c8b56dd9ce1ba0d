"""`python -m train sweep RECIPE.toml`: a grid of runs, those of equal shapes trained as one population."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from train.lab.tables.grid import Point, parse_grid, points_of
from train.loop.description import describe_run
from train.loop.loop import Outcome, exit_code
from train.loop.metrics import is_better
from train.loop.population import group, require_population, run_population
from train.report.comparison import write_comparison
from train.report.tables import terminal_table
from train.run_folder.errors import RunError
from train.run_folder.folder import read_run
from train.run_folder.log import replace_text


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a grid of runs; runs that differ in rates, alpha, dropout or seed alone are trained in one step.

    Options of the recipe, --section.key value, hold for all runs.
    """

    seeds: int = 1
    """Runs at each point of the grid, with seeds that count up from train.seed."""
    grid: tuple[str, ...] = ()
    """Keys and their values, e.g. optim.learning_rate=1e-3,2e-3 adapter.n=1,4,8; all combinations are run."""
    own_order: bool = False
    """Each seed sees the rows in an order of its own, which takes one width (one of data.buckets, or packed rows)."""
    at_once: int | None = None
    """Runs of a population whose activations are in memory at a time; by default all, and on CPU as many as pay."""
    dry_run: bool = False
    """Print which runs would be trained together, and end."""
    resume: bool = False
    """Continue an interrupted sweep; give the same words again."""


def sweep(words: Sequence[str]) -> int:
    """Runs all of it; returns the exit code."""
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        raise ValueError("which recipe? e.g. python -m train sweep train/recipes/local.toml --seeds 8")
    recipe, *rest = words
    if recipe in ("-h", "--help"):
        rest = ["--help"]
    options, overrides = tyro.cli(Options, args=rest, prog="python -m train sweep RECIPE", return_unknown_args=True)
    if options.at_once is not None and options.at_once < 1:
        raise ValueError(f"--at-once {options.at_once} must be at least 1")
    points = points_of(recipe, overrides, parse_grid(options.grid), options.seeds, options.own_order)
    populations = plan(points)
    console = Console()
    for number, population in enumerate(populations, start=1):
        console.print(f"population {number}: {', '.join(point.name for point in population)}", soft_wrap=True)
    if options.dry_run:
        return 0
    folder = Path(points[0].config.output.folder).parent
    again = ["python", "-m", "train", "sweep", *(word for word in words if word != "--resume"), "--resume"]
    outcomes: dict[str, Outcome] = {}
    _check_folder(folder, options.resume)
    for number, population in enumerate(populations, start=1):
        console.rule(f"population {number} of {len(populations)}: {len(population)} runs")
        configs = [point.config for point in population]
        found = run_population(configs, folder / "populations" / str(number), again, options.resume, options.at_once)
        outcomes |= {point.name: outcome for point, outcome in zip(population, found, strict=True)}
        if any(outcome.stopped_by for outcome in found):
            console.print(f"stopped; continue with: {shlex.join(again)}", soft_wrap=True)
            return exit_code(found[0])
    _show(console, folder, points, outcomes)
    return 0


def plan(points: Sequence[Point]) -> list[list[Point]]:
    """The points in groups that are trained together.

    Raises:
      ValueError: runs that no population can hold, or adapters that do not fit the model.
    """
    configs = [point.config for point in points]
    populations = [[points[place] for place in places] for places in group(configs)]
    for population in populations:
        require_population([point.config for point in population])
        describe_run(population[0].config)
    return populations


def _check_folder(folder: Path, resume: bool) -> None:
    started = (folder / "populations").exists()
    if started and not resume:
        raise ValueError(f"{folder} holds a sweep already; add --resume to continue, or choose another --output.folder")
    if resume and not started:
        raise ValueError(f"{folder} holds no sweep to resume; start it without --resume")
    if (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} holds a run; choose another --output.folder for the sweep")


def _show(console: Console, folder: Path, points: Sequence[Point], outcomes: dict[str, Outcome]) -> None:
    """The tables, the page, and sweep.json."""
    runs = {point.name: read_run(point.config.output.folder) for point in points}
    metric = points[0].config.metric
    rows = [
        {**dict(point.values), "folder": point.config.output.folder, metric: outcomes[point.name].best}
        | {"diverged": outcomes[point.name].diverged}
        for point in points
    ]
    replace_text(folder / "sweep.json", json.dumps(rows, indent=2) + "\n")
    scores = settings_scores(points, outcomes)
    if not any(scores.values()):
        raise RunError(f"no run of the sweep gave a {metric}; see {folder / 'sweep.json'}")
    console.print(_settings_table(scores, metric))
    best = min(scores, key=lambda name: _order(metric, scores[name]))
    console.print(f"best {metric}: {best} ({np.mean(scores[best]):.4f})", soft_wrap=True)
    page = write_comparison(folder, runs, "A sweep")
    console.print(f"report {page}", soft_wrap=True)


def settings_scores(points: Sequence[Point], outcomes: dict[str, Outcome]) -> dict[str, list[float]]:
    """The best scores of each setting, over its seeds; of a run that gave none, none."""
    scores: dict[str, list[float]] = {}
    for point in points:
        name = Point(tuple(pair for pair in point.values if pair[0] != "train.seed"), point.config).name
        best = outcomes[point.name].best
        scores.setdefault(name or "all seeds", []).extend([] if best is None else [best])
    return scores


def _order(metric: str, values: list[float]) -> float:
    """Smallest for the best mean."""
    if not values:
        return float("inf")
    mean = float(np.mean(values))
    return -mean if is_better(metric, 1.0, 0.0) else mean


def _settings_table(scores: dict[str, list[float]], metric: str) -> Table:
    headers = ("setting", "runs", f"mean {metric}", "deviation", "least", "most")
    return terminal_table(headers, [(name, *_summary(values)) for name, values in scores.items()])


def _summary(values: list[float]) -> list[str]:
    if not values:
        return ["0", *["-"] * 4]
    spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else "-"
    return [str(len(values)), f"{np.mean(values):.4f}", spread, f"{min(values):.4f}", f"{max(values):.4f}"]
