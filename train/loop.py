"""The training loop."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import melora_jax as mj
from train.checkpoint import Bookkeeping, Checkpoints
from train.compile import Steps, compile_steps
from train.config import to_toml
from train.errors import RunError
from train.evaluate import evaluate
from train.experiment import Experiment
from train.identity import check_config, check_folder, write_facts
from train.interrupt import Interrupt
from train.metrics import is_better
from train.progress import Progress, memory_in_use
from train.record import MetricsLog
from train.run_folder import resume_command


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: its best ranking metric, its last step, and the signal that stopped it, if one did."""

    best: float | None
    step: int
    stopped_by: int | None = None


def run(experiment: Experiment, resume: bool = False) -> Outcome:
    """Trains from the start, or from the newest checkpoint, to the end or to a signal.

    Raises:
      ValueError: the folder holds another run, or nothing to resume; nothing was changed.
      RunError: a loss that is not finite, or a disk that refuses. Earlier checkpoints stay.
    """
    folder = experiment.folder
    check_folder(folder, resume)
    state, frozen = mj.train_state(experiment.model, experiment.tx)
    key = jax.random.fold_in(jax.random.key(experiment.config.train.seed), 2)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        notes = Bookkeeping(config=to_toml(experiment.config))
        if resume:
            check_config(experiment, checkpoints.notes().config, folder)
            state, notes = checkpoints.restore(state)
        write_facts(experiment)
        start = int(state.step)
        with (
            Progress(experiment.total_steps, experiment.config.train.epochs, start_step=start) as progress,
            MetricsLog(folder, experiment.config.train.tensorboard, start if resume else None) as log,
            Interrupt() as interrupt,
        ):
            _introduce(experiment, progress, start)
            steps = compile_steps(experiment, state, frozen, key)
            session = _Session(experiment, checkpoints, log, progress, steps, notes)
            try:
                return session.train(state, frozen, key, interrupt)
            except OSError as error:
                kept, command = checkpoints.describe_latest(), resume_command(folder)
                raise RunError(f"{error}; {kept}; make room and continue with: {command}") from error


@dataclasses.dataclass
class _Session:
    """One part of a run: from its start, or its resumption, to its end."""

    experiment: Experiment
    checkpoints: Checkpoints
    log: MetricsLog
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
        if experiment.config.train.eval_at_start and start == 0:
            self._evaluate_start(state, frozen)
        for done in range(start + 1, total + 1):
            if self._waited_enough():
                return self._stop_early(done - 1)
            rows = experiment.material.plan.batch(done - 1)
            batch = experiment.material.train.batch(rows)
            state, metrics = self.steps.train[rows.width](state, frozen, batch, key)
            self.window.append((metrics, experiment.material.train.examples(rows)))
            due = done % experiment.eval_every == 0 or done == total
            if done % every == 0 or due or interrupt.signal:
                self._report(done)
            if due:
                self._evaluate(done, state, frozen)
            elif interrupt.signal:
                self._save(state, None)
            if interrupt.signal:
                return Outcome(self.notes.best, done, interrupt.signal)
        return Outcome(self.notes.best, total)

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

    def _evaluate_start(self, state: mj.TrainState, frozen: nnx.State) -> None:
        """What the model scores before training; it is not among the candidates for the best."""
        began = time.monotonic()
        metrics = evaluate(self.experiment, self.steps.evaluate, state, frozen)
        self.log.write(
            {"kind": "eval", "step": 0, "epoch": 0.0, **metrics, "seconds": time.monotonic() - began, "best": False}
        )
        self.progress.evaluation(0, 0.0, metrics, False)
        self.window_start = time.monotonic()

    def _evaluate(self, done: int, state: mj.TrainState, frozen: nnx.State) -> None:
        """Evaluates, keeps the adapter if it is the best, and saves a checkpoint."""
        began = time.monotonic()
        try:
            metrics = evaluate(self.experiment, self.steps.evaluate, state, frozen)
        except FloatingPointError as error:
            raise self._diverged(done, f"output ({error})") from None
        name = self.experiment.config.metric
        best = is_better(name, metrics[name], self.notes.best)
        if best:
            self.notes = dataclasses.replace(self.notes, best=metrics[name], best_step=done, waited=0)
        else:
            self.notes = dataclasses.replace(self.notes, waited=self.notes.waited + 1)
        if best:
            # Before the checkpoint: a run that is killed between the two comes here again.
            self._keep_adapter(state, metrics)
        self._save(state, metrics[name] if is_better(name, 1.0, 0.0) else -metrics[name])
        seconds, epoch = time.monotonic() - began, done / self.experiment.material.plan.steps_per_epoch
        self.log.write({"kind": "eval", "step": done, "epoch": epoch, **metrics, "seconds": seconds, "best": best})
        self.progress.evaluation(done, epoch, metrics, best)
        self.window_start = time.monotonic()

    def _save(self, state: mj.TrainState, score: float | None) -> None:
        self.notes = dataclasses.replace(self.notes, seconds=time.monotonic() - self.began)
        self.checkpoints.save(state, self.notes, score)

    def _keep_adapter(self, state: mj.TrainState, scores: dict[str, float]) -> None:
        # The next step donates the state's arrays, so the model gets copies.
        nnx.update(self.experiment.model, jax.tree.map(np.array, state.trainable))
        mj.save_adapter(self.experiment.model, self.experiment.folder / "adapter", scores=scores)


def _introduce(experiment: Experiment, progress: Progress, start: int) -> None:
    progress.note(str(experiment.adaptation))
    for note in experiment.material.notes:
        progress.note(note)
    widths = ", ".join(map(str, experiment.material.plan.widths))
    progress.note(
        f"{experiment.total_steps:,} steps of {experiment.config.train.batch_size} rows; compiling widths {widths}"
    )
    if start:
        progress.note(f"resuming after step {start:,}")


def exit_code(outcome: Outcome) -> int:
    """0, or 128 plus the signal's number as shells report it."""
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def describe_stop(outcome: Outcome, folder: Path) -> str:
    """What to tell somebody whose run was interrupted."""
    name = signal.Signals(outcome.stopped_by).name if outcome.stopped_by else ""
    return f"stopped by {name} after step {outcome.step}, which is saved; continue with: {resume_command(folder)}"
