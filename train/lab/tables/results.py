"""The results of a table, read from its runs' folders, and statistics over them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melora_jax.core import effective_rank
from train.lab.tables.cells import is_finished
from train.lab.tables.scores import Difference, Interval, difference, interval
from train.lab.tables.table import Row
from train.loop.metrics import is_better
from train.run_folder.folder import Run, read_run
from train.run_folder.log import replace_text

MANIFEST = "table.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """One row's finished runs.

    Attributes:
      task, word: the row.
      settings: of the arm, by dotted key.
      metric: ranks its evaluations.
      n, r, rank: of its adapters; r is "mixed" if layers differ; without adapters 0, "-" and 0.
      parameters, head: numbers of trained parameters in adapters and in heads.
      rate: the learning rate of its runs; `choices` has each rate's score on held-back rows.
      steps: of one run.
      last, best: the score after the last step, and the best of all evaluations, by seed.
      effective: the effective rank of the trained updates, mean over layers and seeds; None without adapters.
    """

    task: str
    word: str
    settings: Mapping[str, Any]
    metric: str
    n: int
    r: str
    rank: int
    parameters: int
    head: int
    rate: float
    choices: Mapping[str, float]
    steps: int
    last: Mapping[str, float]
    best: Mapping[str, float]
    effective: float | None

    @property
    def score(self) -> Interval:
        """The mean of the last scores over seeds."""
        return interval(list(self.last.values()))

    @property
    def best_score(self) -> Interval:
        """The mean over seeds of each run's best evaluation: the paper's protocol, which is optimistic."""
        return interval(list(self.best.values()))

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the least or greatest one tried, so that a better one may lie beyond."""
        rates = sorted(map(float, self.choices))
        return len(rates) > 1 and self.rate in (rates[0], rates[-1])

    def against(self, reference: Result) -> Difference:
        """Its last scores against another row's, seed by seed, with the sign reversed if less is better."""
        sign = 1.0 if is_better(self.metric, 1.0, 0.0) else -1.0
        pairs = [(sign * self.last[seed], sign * reference.last[seed]) for seed in self.last if seed in reference.last]
        return difference([ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def write_manifest(folder: Path, rows: Sequence[Row], reference: str, command: str) -> None:
    """Writes the table's rows and runs into `folder`/table.json, so that results can be read without the options."""
    entries = [
        {
            "task": row.task,
            "word": row.arm.word,
            "settings": dict(row.arm.settings),
            "folder": str(row.folder.relative_to(folder)),
            "choices": {f"{rate:g}": Path(run.output.folder).name for rate, run in row.choices().items()},
            "seeds": {str(run.train.seed): Path(run.output.folder).name for run in row.reported(row.rates[0])},
        }
        for row in rows
    ]
    text = json.dumps({"command": command, "reference": reference, "rows": entries}, indent=2)
    replace_text(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
      ValueError: the file is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"command": str(manifest["command"]), "reference": manifest["reference"], "rows": manifest["rows"]}
    except FileNotFoundError:
        raise ValueError(f"there is no {MANIFEST} in {folder}; give the folder of `python -m train glue`") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); start the same `python -m train glue` again") from None


def read_results(folder: Path) -> list[Result]:
    """The results of all rows whose runs are finished, in the table's order."""
    return [found for entry in read_manifest(folder)["rows"] if (found := _result(folder, entry)) is not None]


def score_after_last(run: Run) -> float:
    """The ranking metric after a run's last step; NaN if its loss stopped being finite before that."""
    evaluated = [event for event in run.evaluations if event["step"] == run.last_step]
    return float(evaluated[-1][run.metrics[0]]) if evaluated else math.nan


def _result(folder: Path, entry: Mapping[str, Any]) -> Result | None:
    place = folder / entry["folder"]
    if not all(is_finished(place / name) for name in entry["seeds"].values()):
        return None
    runs = {seed: read_run(place / name) for seed, name in entry["seeds"].items()}
    first = next(iter(runs.values()))
    metric, sites = first.metrics[0], first.sites
    kinds = sorted({(site.n, tuple(site.r), site.rank) for site in sites})
    effective = [effective_rank(values) for run in runs.values() for values in run.spectra.values()]
    return Result(
        task=entry["task"],
        word=entry["word"],
        settings=entry["settings"],
        metric=metric,
        n=max((n for n, _, _ in kinds), default=0),
        r=str(kinds[0][1][0]) if len(kinds) == 1 and len(set(kinds[0][1])) == 1 else "mixed" if kinds else "-",
        rank=max((rank for _, _, rank in kinds), default=0),
        parameters=first.adapter,
        head=first.head,
        rate=float(first.setting("optim", "learning_rate")),
        choices={rate: score_after_last(read_run(place / name)) for rate, name in entry["choices"].items()},
        steps=first.last_step,
        last={seed: score_after_last(run) for seed, run in runs.items()},
        best={seed: float(run.best[metric]) if run.best else math.nan for seed, run in runs.items()},
        effective=float(np.mean(effective)) if effective else None,
    )
