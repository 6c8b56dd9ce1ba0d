"""Many runs as one: prepared, trained in one jitted step, and each left as a run folder of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import melora_jax as mj
from train.checkpoint import Checkpoints
from train.compile import Steps, compile_widths
from train.config import RunConfig, to_toml
from train.errors import RunError
from train.experiment import Experiment, dropout_key, make_tx, prepare
from train.finish import finish
from train.identity import check_config, check_folder, check_started, write_facts
from train.interrupt import make_interrupt
from train.leftovers import clear_leftovers
from train.loop import Outcome
from train.members import require_population
from train.population_loop import PopulationNotes, Session
from train.record import MetricsLog, replace_text
from train.report import write_report
from train.reporting import introduce, make_progress
from train.run_folder import POPULATION, population_of
from train.step import Batch, make_loss

# On CPU more tokens at a time cost more in caches missed than they save: of 8 MiniLM members of 64 to 256 tokens a step
# of all took 0.72 to 0.85 of eight steps' time; of 1,024 tokens 1.3 of it, and two at a time 0.88.
_CPU_TOKENS = 2048
_OUTCOMES = "outcomes.json"
_RATES = ("learning_rate", "head_learning_rate", "b_learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Population:
    """Everything a population needs: its members' runs, which share data and base, and what they differ in."""

    experiments: list[Experiment]
    members: mj.Members
    state: mj.TrainState
    frozen: nnx.State
    at_once: int

    @property
    def own_streams(self) -> bool:
        """Whether each member sees its own order of rows."""
        return len({experiment.config.data_seed for experiment in self.experiments}) > 1

    def batch(self, step: int) -> tuple[int, Batch, list[Any]]:
        """The width and the arrays of a step, and the rows of each member's batch."""
        rows = [experiment.material.plan.batch(step) for experiment in self.experiments]
        if not self.own_streams:
            return rows[0].width, self.experiments[0].feed(self.experiments[0].material.train, rows[0]), rows
        batches = [one.feed(one.material.train, own) for one, own in zip(self.experiments, rows, strict=True)]
        return rows[0].width, jax.tree.map(lambda *arrays: np.stack(arrays), *batches), rows

    def compile(self) -> Steps:
        """The steps of all members, ahead."""
        first = self.experiments[0]
        step = mj.make_population_step(
            first.model,
            lambda rates: _tx(first, rates),
            make_loss(first.measure),
            streams="own" if self.own_streams else "shared",
            accumulate=first.config.train.accumulate,
            at_once=self.at_once,
        )
        evaluate = mj.make_population_eval(first.model, first.measure, at_once=self.at_once)
        lead = (len(self.experiments),) if self.own_streams else ()

        def stacked(batch: Batch) -> Batch:
            return {name: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype) for name, x in batch.items()}

        return compile_widths(
            first,
            lambda batch: step.lower(self.state, self.frozen, stacked(batch), self.members),
            lambda batch: evaluate.lower(self.state, self.frozen, batch, self.members),
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
      configs: of the runs, which may differ in `train.members.VARYING`. All see one order of rows where their
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


def prepare_population(configs: Sequence[RunConfig], at_once: int | None = None) -> Population:
    """Reads the data once, and each member's start over one base; arguments as for `run_population`.

    Raises:
      ValueError: as for `prepare`; or own orders of rows over batches of several widths.
    """
    members, experiments = _members(configs), []

    def models() -> Iterator[nnx.Module]:
        for config in configs:
            with _quietly() if experiments else contextlib.nullcontext():
                experiments.append(prepare(config, experiments[0] if experiments else None))
            if len({one.config.data_seed for one in experiments}) > 1:
                _require_one_width(experiments[0])
            yield experiments[-1].model

    first: list[Experiment] = experiments
    state, frozen = mj.population_state(models(), lambda rates: _tx(first[0], rates), members)
    for experiment in experiments:
        nnx.update(experiment.model, frozen)  # one base in memory, and not one a member
    return Population(experiments, members, state, frozen, at_once or _as_many_as_pay(experiments[0], len(configs)))


def _as_many_as_pay(experiment: Experiment, members: int) -> int:
    """Members to compute at once."""
    if jax.default_backend() != "cpu":
        return members
    train = experiment.config.train
    tokens = train.batch_size // train.accumulate * max(experiment.material.plan.widths)
    return min(members, max(2, _CPU_TOKENS // tokens))


def _members(configs: Sequence[RunConfig]) -> mj.Members:
    """What the runs differ in. Rates that follow the learning rate are resolved."""
    rates = {name: [_rate(config, name) for config in configs] for name in _RATES}
    alphas, dropouts = ([getattr(config.adapter, name) for config in configs] for name in ("alpha", "dropout"))
    return mj.make_members(
        [dropout_key(config) for config in configs],
        optim=rates,
        alpha=[alpha / alphas[0] for alpha in alphas] if len({*map(repr, alphas)}) > 1 else None,
        dropout=dropouts if len(set(dropouts)) > 1 else None,
    )


def _rate(config: RunConfig, name: str) -> float:
    own = getattr(config.optim, name)
    return config.optim.learning_rate if own is None else own


def _tx(experiment: Experiment, rates: Any) -> Any:
    return make_tx(experiment.model, dataclasses.replace(experiment.config.optim, **rates), experiment.total_steps)[1]


def _require_one_width(experiment: Experiment) -> None:
    widths = experiment.material.plan.widths
    if len(widths) > 1:
        raise ValueError(
            f"runs that differ in train.data_seed see batches of different widths at one step ({min(widths)} to "
            f"{max(widths)} tokens), and padded ones would draw other dropout masks than their lone runs; set "
            f"data.buckets=[{max(widths)}], for one width, or one train.data_seed for all"
        )


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
        session = Session(population, checkpoints, logs, progress, population.compile(), notes)
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


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The first member said what there was to say."""
    logger = logging.getLogger("melora_jax")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
