"""Many runs as one: those that differ in numbers alone, trained in one step, each left as a run folder of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config.run_config import RunConfig, to_toml
from train.loop.best import finish
from train.loop.bookkeeping import Outcome
from train.loop.cohort import population
from train.loop.identity import check_config, check_folder, settings
from train.loop.loop import train
from train.loop.setup import Experiment
from train.report.report import write_report
from train.run_folder.folder import POPULATION, population_of
from train.run_folder.log import replace_text

_OUTCOMES = "outcomes.json"

# What members of one population may differ in; `train.data_seed` where each member sees its own order of rows.
VARYING = (
    "optim.learning_rate",
    "optim.head_learning_rate",
    "optim.b_learning_rate",
    "optim.weight_decay",
    "adapter.alpha",
    "adapter.dropout",
    "train.seed",
    "train.data_seed",
    "train.warm_start",
    "output.folder",
)


def run_population(
    configs: Sequence[RunConfig],
    folder: Path,
    resume_command: Sequence[str],
    resume: bool = False,
    at_once: int | None = None,
) -> list[Outcome]:
    """Trains runs that differ in numbers alone in one jitted step; each leaves what its lone run would leave.

    Args:
      configs: of the runs, which may differ in `VARYING`. All see one order of rows where their
        `data_seed` is the same; else each sees its own, which takes batches of one width.
      folder: where the population's own files go: checkpoints, and its end.
      resume_command: the words of the command that continues it, for messages and reports.
      resume: continue an earlier call from its newest checkpoint, or from the start if there is none. A
        population that has come to its end is not trained again.
      at_once: members whose activations are in memory at a time; by default all, and on CPU as many as pay.

    Returns:
      How each run ended, in the order of `configs`.

    Raises:
      ValueError: runs that can't be one population, a folder that holds another run, bad data or settings.
      RunError: a disk that refuses.
    """
    require_population(configs)
    ended = folder / _OUTCOMES
    if resume and ended.exists():
        return _ended(configs, json.loads(ended.read_text(encoding="utf-8")))
    folders = [folder, *(Path(config.output.folder) for config in configs)]
    _check_folders(folders, resume)
    cohort = population(configs, folder, at_once)
    for claimed in folders:
        _claim(claimed, resume_command)
    outcomes = train(cohort, resume)
    if not any(outcome.stopped_by for outcome in outcomes):
        _finish(cohort.members, outcomes)
        found = [{"config": to_toml(c), **dataclasses.asdict(o)} for c, o in zip(configs, outcomes, strict=True)]
        replace_text(ended, json.dumps(found, indent=2) + "\n")
    return outcomes


def _check_folders(folders: Sequence[Path], resume: bool) -> None:
    """Nothing may be there that is not the population's own; it may be anywhere between its start and its end."""
    for folder in folders:
        if not resume or population_of(folder) is None:
            check_folder(folder, resume=False)


def _claim(folder: Path, words: Sequence[str]) -> None:
    """Says whose the folder is, before anything else is in it."""
    if population_of(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / POPULATION, json.dumps({"resume": list(words)}) + "\n")


def _ended(configs: Sequence[RunConfig], found: list[dict[str, Any]]) -> list[Outcome]:
    if len(found) != len(configs):
        raise ValueError(f"the population had {len(found)} members, and not {len(configs)}; resume it as it was")
    for config, one in zip(configs, found, strict=True):
        check_config(config, one.pop("config"))
    return [Outcome(**one) for one in found]


def _finish(experiments: Sequence[Experiment], outcomes: Sequence[Outcome]) -> None:
    for experiment, outcome in zip(experiments, outcomes, strict=True):
        if outcome.best is None:
            write_report(experiment.folder)  # without an adapter: no evaluation gave a score
        else:
            finish(experiment)


def group(configs: Sequence[RunConfig]) -> list[list[int]]:
    """The configurations that make a population each, by their places in `configs`, in the order of first appearance.

    Runs on a mesh, and of many hosts, are refused by `require_population`, not here.
    """
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for place, config in enumerate(configs):
        fixed = _fixed(config)
        own = next((places for known, places in groups if known == fixed), None)
        if own is None:
            groups.append((fixed, [place]))
        else:
            own.append(place)
    return [places for _, places in groups]


def require_population(configs: Sequence[RunConfig]) -> None:
    """Raises ValueError where `configs` can't be one population; the message names the key."""
    if not configs:
        raise ValueError("a population of no runs; give at least one configuration")
    first = _fixed(configs[0])
    for config in configs[1:]:
        other = _fixed(config)
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{key} is {first.get(key)!r} in one run and {other.get(key)!r} in another, and a population can't "
                    f"vary it; make it two populations, or vary {', '.join(VARYING[:-1])}"
                )
    for config in configs:
        _require_one_device(config)
    folders = [Path(config.output.folder).resolve() for config in configs]
    if twice := [str(folder) for place, folder in enumerate(folders) if folder in folders[:place]]:
        raise ValueError(f"two runs have the output.folder {twice[0]}; give each its own")


def _require_one_device(config: RunConfig) -> None:
    hosts = config.distributed
    if set(config.mesh.sizes.values()) != {1}:
        sizes = ", ".join(f"mesh.{name}={size}" for name, size in config.mesh.sizes.items() if size != 1)
        raise ValueError(f"{sizes}: a population runs on one device so far; unset it, or make the runs one by one")
    if hosts.cluster != "none" or hosts.coordinator is not None:
        raise ValueError("[distributed]: a population runs on one device so far; unset it")


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The settings by key, less those that members may differ in."""
    varying = set(VARYING)
    if not config.method.varying_alpha():
        varying.remove("adapter.alpha")
    return {key: value for key, value in settings(config).items() if key not in varying}
