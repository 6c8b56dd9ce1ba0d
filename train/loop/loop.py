"""The training loop."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import melora_jax as mj
from train.config.metrics import is_better
from train.config.run_config import to_toml
from train.hosts.hosts import is_first, meet, whole_on_host
from train.hosts.interrupt import Interrupt, make_interrupt
from train.loop.best import save_best
from train.loop.checkpoint import Bookkeeping, Checkpoints
from train.loop.evaluate import evaluate
from train.loop.identity import check_config, check_folder, check_started, write_facts
from train.loop.reporting import introduce, make_log, make_progress
from train.loop.setup import Experiment
from train.loop.steps import Steps, compile_steps
from train.process import keep_freed_memory
from train.report.terminal import Progress, memory_in_use
from train.run_folder.errors import HostLostError, RunError
from train.run_folder.folder import resume_command
from train.run_folder.leftovers import clear_leftovers
from train.run_folder.log import MetricsLog, NoLog


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its best ranking metric, its last step, and the signal that stopped it, if one did.

    A member of a population whose loss was not finite after `diverged` steps ended there, without stopping the others.
    """

    best: float | None
    step: int
    stopped_by: int | None = None
    diverged: int | None = None


def run(experiment: Experiment, resume: bool = False) -> Outcome:
    """Trains from the start, or from the newest checkpoint, to the end or to a signal.

    Raises:
      ValueError: the folder holds another run, or nothing to resume; nothing was changed.
      RunError: a loss that is not finite, or a disk that refuses. Earlier checkpoints stay.
    """
    folder = experiment.folder
    check_folder(folder, resume)
    meet("every process has looked at the folder that the first one is about to change")
    state, frozen = mj.train_state(experiment.model, experiment.tx)
    key = experiment.key()
    with Checkpoints(folder / "checkpoints", Bookkeeping) as checkpoints:
        notes, saved = Bookkeeping(config=to_toml(experiment.config)), checkpoints.latest() is not None
        if saved:
            check_config(experiment.config, checkpoints.notes().config)
            state, notes = checkpoints.restore(state)
        elif resume:
            check_started(experiment)
        if is_first():
            clear_leftovers(folder)
            write_facts(experiment)
        start = int(state.step)
        # A run that was killed before its first checkpoint begins again, and none of its events counts.
        logged = (start if saved else -1) if resume else None
        with (
            make_progress(experiment, start) as progress,
            make_log(experiment, logged, notes.unevaluated) as log,
            make_interrupt(experiment.mesh) as interrupt,
        ):
            introduce(experiment, progress, start)
            steps = compile_steps(experiment, state, frozen, key)
            keep_freed_memory()
            session = _Session(experiment, checkpoints, log, progress, steps, notes)
            try:
                return session.train(state, frozen, key, interrupt)
            except OSError as error:
                kept, command = checkpoints.describe_latest(), resume_command(folder)
                raise RunError(f"{error}; {kept}; make room and continue with: {command}") from error
            except jax.errors.JaxRuntimeError as error:
                if jax.process_count() == 1:
                    raise
                raise HostLostError(error, checkpoints.describe_latest(), resume_command(folder)) from error


@dataclasses.dataclass
class _Session:
    """One part of a run: from its start, or its resumption, to its end."""

    experiment: Experiment
    checkpoints: Checkpoints[Bookkeeping]
    log: MetricsLog | NoLog
    progress: Progress
    steps: Steps
    notes: Bookkeeping
    window: list[tuple[dict[str, jax.Array], np.ndarray]] = dataclasses.field(default_factory=list)
    window_start: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.began = time.monotonic() - self.notes.seconds
        self.lengths = self.experiment.material.train.lengths

    def train(self, state: mj.TrainState, frozen: nnx.State, key: jax.Array, interrupt: Interrupt) -> Outcome:
        """The loop itself."""
        experiment, total = self.experiment, self.experiment.total_steps
        every, start = experiment.config.train.log_every, int(state.step)
        asked = experiment.config.train.eval_at_start and start == 0
        if asked and not self._evaluate_start(state, frozen, interrupt):
            return Outcome(None, 0, interrupt.signal)
        if self.notes.unevaluated and not self._evaluate(start, state, frozen, interrupt):
            return Outcome(self.notes.best, start, interrupt.signal)
        for done in range(start + 1, total + 1):
            if self._waited_enough():
                return self._stop_early(done - 1)
            rows = experiment.material.plan.batch(done - 1)
            batch = experiment.feed(experiment.material.train, rows)
            state, metrics = self.steps.train[rows.width](state, frozen, batch, key)
            self.window.append((metrics, experiment.material.train.examples(rows)))
            self._keep_up()
            due = done % experiment.eval_every == 0 or done == total
            stop = interrupt.signal  # read once: one that comes later finds the next step
            if done % every == 0 or due or stop:
                self._report(done)
            if due:
                stop = None if self._evaluate(done, state, frozen, interrupt) else interrupt.signal
            elif stop:
                self._save(state)
            if stop:
                return Outcome(self.notes.best, done, stop)
        return Outcome(self.notes.best, total)

    def _keep_up(self) -> None:
        """Waits for all steps but the two newest: the device is never idle, and a signal is answered soon."""
        if len(self.window) > 2:
            jax.block_until_ready(self.window[-3][0])

    def _waited_enough(self) -> bool:
        patience = self.experiment.config.train.patience
        return patience is not None and self.notes.waited >= patience

    def _stop_early(self, done: int) -> Outcome:
        waited, metric = self.notes.waited, self.experiment.config.metric
        self.progress.note(f"stopped early: no better {metric} in {waited} evaluations")
        return Outcome(self.notes.best, done)

    def _report(self, done: int) -> None:
        """Fetches the metrics of the steps since the last report: the one wait for the device between evaluations."""
        fetched = [jax.device_get(metrics) for metrics, _ in self.window]
        first = done - len(fetched) + 1
        for step, metrics in enumerate(fetched, start=first):
            if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
                raise self._diverged(step, "loss" if not np.isfinite(metrics["loss"]) else "gradient norm")
        seconds = max(time.monotonic() - self.window_start, 1e-9)
        epoch = done / self.experiment.material.plan.steps_per_epoch
        rate = np.asarray(self.experiment.schedule(done - 1)).item()
        rows = np.concatenate([rows for _, rows in self.window])
        examples, tokens = len(rows) / seconds, self.lengths[rows].sum() / seconds
        self.log.write(
            {
                "kind": "train",
                "step": done,
                "epoch": epoch,
                "loss": float(fetched[-1]["loss"]),
                "learning_rate": rate,
                "grad_norm": float(fetched[-1]["grad_norm"]),
                "examples_per_second": examples,
                "tokens_per_second": tokens,
                "memory_bytes": memory_in_use().size,
                "seconds": time.monotonic() - self.began,
            }
        )
        loss = float(np.mean([metrics["loss"] for metrics in fetched]))
        self.progress.update(step=done, epoch=epoch, loss=loss, learning_rate=rate, examples_per_second=examples)
        self.window, self.window_start = [], time.monotonic()

    def _diverged(self, step: int, what: str) -> RunError:
        return RunError(
            f"the {what} at step {step} is not finite; {self.checkpoints.describe_latest()}; start again with a lower "
            "optim.learning_rate or more warm-up"
        )

    def _evaluate_start(self, state: mj.TrainState, frozen: nnx.State, interrupt: Interrupt) -> bool:
        """What the model scores before training, no candidate for the best; False if a signal broke it off."""
        began = time.monotonic()
        metrics = evaluate(self.experiment, self.steps.evaluate, state, frozen, lambda: interrupt.signal)
        if metrics is None:
            return False
        self.log.write(
            {"kind": "eval", "step": 0, "epoch": 0.0, **metrics, "seconds": time.monotonic() - began, "best": False}
        )
        self.progress.evaluation(0, 0.0, metrics, False)
        self.window_start = time.monotonic()
        return True

    def _evaluate(self, done: int, state: mj.TrainState, frozen: nnx.State, interrupt: Interrupt) -> bool:
        """Evaluates, keeps the model if it is the best, and saves a checkpoint; False if a signal broke it off."""
        began = time.monotonic()
        try:
            metrics = evaluate(self.experiment, self.steps.evaluate, state, frozen, lambda: interrupt.signal)
        except FloatingPointError as error:
            raise self._diverged(done, f"output ({error})") from None
        if metrics is None:
            self.notes = dataclasses.replace(self.notes, unevaluated=True)
            self._save(state)
            return False
        best = self._take_note(done, metrics)
        seconds, epoch = time.monotonic() - began, done / self.experiment.material.plan.steps_per_epoch
        # All before the checkpoint: a run that is killed between these comes here again.
        if best:
            self._keep_best(state, metrics)
        self.log.write({"kind": "eval", "step": done, "epoch": epoch, **metrics, "seconds": seconds, "best": best})
        self._save(state)
        self.progress.evaluation(done, epoch, metrics, best)
        self.window_start = time.monotonic()
        return True

    def _take_note(self, done: int, metrics: Mapping[str, float]) -> bool:
        """Books an evaluation; whether it is the best so far."""
        name = self.experiment.config.metric
        best = is_better(name, metrics[name], self.notes.best)
        found = {"best": metrics[name], "best_step": done, "waited": 0} if best else {"waited": self.notes.waited + 1}
        self.notes = dataclasses.replace(self.notes, unevaluated=False, **found)
        return best

    def _save(self, state: mj.TrainState) -> None:
        self.notes = dataclasses.replace(self.notes, seconds=time.monotonic() - self.began)
        self.checkpoints.save(state, self.notes, self.notes.best_step)

    def _keep_best(self, state: mj.TrainState, scores: dict[str, float]) -> None:
        # The next step donates the state's arrays, so the model gets copies.
        nnx.update(self.experiment.model, whole_on_host(state.trainable))
        if is_first():
            save_best(self.experiment, scores)


def exit_code(outcome: Outcome) -> int:
    """0, or 128 plus the signal's number as shells report it."""
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def describe_stop(outcome: Outcome, folder: Path) -> str:
    """What to tell somebody whose run was interrupted."""
    name = signal.Signals(outcome.stopped_by).name if outcome.stopped_by else ""
    where = f"after step {outcome.step}, which is saved" if outcome.step else "before the first step"
    return f"stopped by {name} {where}; continue with: {resume_command(folder)}"
