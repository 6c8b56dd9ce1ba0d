"""Many runs as one: prepared, trained in one jitted step, and each left as a run folder of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config.run_config import RunConfig, to_toml
from train.hosts.interrupt import make_interrupt
from train.loop.checkpoint import Checkpoints
from train.loop.finish import finish
from train.loop.identity import check_config, check_folder, check_started, write_facts
from train.loop.loop import Outcome
from train.loop.members import require_population
from train.loop.population_experiment import Population, prepare_population
from train.loop.population_loop import PopulationNotes, Session
from train.loop.reporting import introduce, make_progress
from train.loop.setup import Experiment
from train.process import keep_freed_memory
from train.report.report import write_report
from train.run_folder.errors import RunError
from train.run_folder.folder import POPULATION, population_of
from train.run_folder.leftovers import clear_leftovers
from train.run_folder.log import MetricsLog, replace_text

_OUTCOMES = "outcomes.json"


def run_population(
    configs: Sequence[RunConfig],
    folder: Path,
    resume_command: Sequence[str],
    resume: bool = False,
    at_once: int | None = None,
) -> list[Outcome]:
    """Trains runs that differ in numbers alone in one jitted step; each leaves what its lone run would leave.

    Args:
      configs: of the runs, which may differ in `train.loop.members.VARYING`. All see one order of rows where their
        `data_seed` is the same; else each sees its own, which takes batches of one width.
      folder: where the population's own files go: checkpoints, and its end.
      resume_command: the words of the command that goes on with it, for messages and reports.
      resume: go on where an earlier call was: from its newest checkpoint, or from the start where there is none. A
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
    _check_folders([folder, *(Path(config.output.folder) for config in configs)], resume)
    population = prepare_population(configs, at_once)
    _claim(folder, resume_command)
    outcomes = _train(population, folder, resume_command, resume)
    if not any(outcome.stopped_by for outcome in outcomes):
        _finish(population, outcomes)
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


def _train(population: Population, folder: Path, words: Sequence[str], resume: bool) -> list[Outcome]:
    experiments, state = population.experiments, population.state
    with Checkpoints(folder / "checkpoints", PopulationNotes) as checkpoints, contextlib.ExitStack() as open_logs:
        notes = PopulationNotes.start([to_toml(experiment.config) for experiment in experiments])
        saved = checkpoints.latest() is not None
        if saved:
            _check_members(experiments, checkpoints.notes())
            state, notes = checkpoints.restore(state)
        for experiment in experiments:
            if resume and not saved:
                check_started(experiment)
            _claim(experiment.folder, words)
            clear_leftovers(experiment.folder)
            write_facts(experiment)
        start = int(state.step)
        progress = open_logs.enter_context(make_progress(experiments[0], start))
        logged = (start if saved else -1) if resume else None
        logs = [
            open_logs.enter_context(MetricsLog(one.folder, one.config.train.tensorboard, logged, notes.unevaluated))
            for one in experiments
        ]
        interrupt = open_logs.enter_context(make_interrupt(None))
        introduce(experiments[0], progress, start)
        progress.note(f"{len(experiments)} members in one step, {population.at_once} at a time")
        steps = population.compile()
        keep_freed_memory()
        session = Session(population, checkpoints, logs, progress, steps, notes)
        try:
            return session.train(state, interrupt)
        except OSError as error:
            raise RunError(
                f"{error}; {checkpoints.describe_latest()}; make room and continue with: {' '.join(words)}"
            ) from error


def _check_members(experiments: Sequence[Experiment], notes: PopulationNotes) -> None:
    """A resumed population must be of the same runs."""
    if len(notes.members) != len(experiments):
        raise ValueError(
            f"the population had {len(notes.members)} members, and is to go on with {len(experiments)}; resume it as "
            "it was"
        )
    for experiment, saved in zip(experiments, notes.members, strict=True):
        check_config(experiment.config, saved.config)


def _ended(configs: Sequence[RunConfig], found: list[dict[str, Any]]) -> list[Outcome]:
    if len(found) != len(configs):
        raise ValueError(f"the population had {len(found)} members, and not {len(configs)}; resume it as it was")
    for config, one in zip(configs, found, strict=True):
        check_config(config, one.pop("config"))
    return [Outcome(**one) for one in found]


def _finish(population: Population, outcomes: Sequence[Outcome]) -> None:
    for experiment, outcome in zip(population.experiments, outcomes, strict=True):
        if outcome.best is None:
            write_report(experiment.folder)  # without an adapter: no evaluation gave a score
        else:
            finish(experiment)
