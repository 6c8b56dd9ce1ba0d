"""The training loop of a population: as `train.loop`, with one log, one best and one end a member."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from flax import nnx

import melora_jax as mj
from melora_jax.training import member_state
from train.config.metrics import is_better
from train.hosts.interrupt import Interrupt
from train.loop.best import save_best
from train.loop.checkpoint import Bookkeeping, Checkpoints
from train.loop.evaluate import metrics_of, run_batches
from train.loop.loop import Outcome
from train.loop.population_experiment import Population
from train.loop.setup import Experiment
from train.loop.steps import Steps
from train.report.terminal import Progress, memory_in_use
from train.run_folder.log import MetricsLog


@dataclasses.dataclass(frozen=True)
class PopulationNotes:
    """What a population must remember beside its arrays.

    Attributes:
      members: each one's own.
      diverged: after how many steps a member's loss was not finite; None while it is.
      seconds: time spent so far.
      unevaluated: the evaluation that was due at this step was broken off, and is the first thing to do.
    """

    members: Sequence[Bookkeeping]
    diverged: Sequence[int | None]
    seconds: float = 0.0
    unevaluated: bool = False

    def __post_init__(self) -> None:
        """Members come from a checkpoint as plain tables."""
        members = [one if isinstance(one, Bookkeeping) else Bookkeeping(**one) for one in self.members]
        object.__setattr__(self, "members", members)

    @classmethod
    def start(cls, configs: Sequence[str]) -> Self:
        """Those of a population that has not begun."""
        return cls([Bookkeeping(config=config) for config in configs], [None] * len(configs))


@dataclasses.dataclass
class Session:
    """One part of a population's training: from its start, or its resumption, to its end."""

    population: Population
    checkpoints: Checkpoints[PopulationNotes]
    logs: Sequence[MetricsLog]
    progress: Progress
    steps: Steps
    notes: PopulationNotes
    window: list[tuple[dict[str, jax.Array], list[np.ndarray]]] = dataclasses.field(default_factory=list)
    window_start: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.began = time.monotonic() - self.notes.seconds
        self.experiments: list[Experiment] = self.population.experiments
        self.first = self.experiments[0]

    def train(self, state: mj.TrainState, interrupt: Interrupt) -> list[Outcome]:
        """The loop itself."""
        first, total, start = self.first, self.first.total_steps, int(state.step)
        if first.config.train.eval_at_start and start == 0 and not self._evaluate_start(state, interrupt):
            return self._outcomes(0, interrupt.signal)
        if self.notes.unevaluated and not self._evaluate(start, state, interrupt):
            return self._outcomes(start, interrupt.signal)
        for done in range(start + 1, total + 1):
            if not self._live():
                self.progress.note(f"stopped early: no better {first.config.metric} within train.patience")
                return self._outcomes(done - 1)
            width, batch, rows = self.population.batch(done - 1)
            state, metrics = self.steps.train[width](state, self.population.frozen, batch, self.population.members)
            self.window.append(
                (metrics, [one.material.train.examples(r) for one, r in zip(self.experiments, rows, strict=True)])
            )
            if len(self.window) > 2:  # as in the lone loop: the device is never idle, and a signal is answered soon
                jax.block_until_ready(self.window[-3][0])
            due = done % first.eval_every == 0 or done == total
            stop = interrupt.signal
            if done % first.config.train.log_every == 0 or due or stop:
                self._report(done)
            if due:
                stop = None if self._evaluate(done, state, interrupt) else interrupt.signal
            elif stop:
                self._save(state)
            if stop:
                return self._outcomes(done, stop)
        return self._outcomes(total)

    def _live(self) -> list[int]:
        """The members that have neither diverged nor waited out their patience."""
        patience = self.first.config.train.patience
        pairs = enumerate(zip(self.notes.members, self.notes.diverged, strict=True))
        return [i for i, (one, end) in pairs if end is None and (patience is None or one.waited < patience)]

    def _outcomes(self, done: int, stopped_by: int | None = None) -> list[Outcome]:
        live, pairs = self._live(), enumerate(zip(self.notes.members, self.notes.diverged, strict=True))
        ends = [(one, end, done if i in live else end or self._waited_at(one)) for i, (one, end) in pairs]
        return [Outcome(one.best, step, stopped_by, end) for one, end, step in ends]

    def _waited_at(self, book: Bookkeeping) -> int:
        """The step of the evaluation at which a member had waited out its patience."""
        every = self.first.eval_every
        return min(((book.best_step or 0) // every + book.waited) * every, self.first.total_steps)

    def _report(self, done: int) -> None:
        """Fetches the metrics of the steps since the last report, and logs them for each member."""
        fetched = [jax.device_get(metrics) for metrics, _ in self.window]
        losses, norms = (np.stack([one[name] for one in fetched]) for name in ("loss", "grad_norm"))
        first = done - len(fetched) + 1
        for member in self._live():
            broken = ~(np.isfinite(losses[:, member]) & np.isfinite(norms[:, member]))
            if broken.any():
                self._end(member, first + int(broken.argmax()), "loss or the gradient norm")
        seconds = max(time.monotonic() - self.window_start, 1e-9)
        epoch = done / self.first.material.plan.steps_per_epoch
        live, speeds = self._live(), []
        for member in live:
            one = self.experiments[member]
            rows = np.concatenate([rows[member] for _, rows in self.window])
            speeds.append(len(rows) / seconds)
            self.logs[member].write(
                {
                    "kind": "train",
                    "step": done,
                    "epoch": epoch,
                    "loss": float(losses[-1, member]),
                    "learning_rate": np.asarray(one.schedule(done - 1)).item(),
                    "grad_norm": float(norms[-1, member]),
                    "examples_per_second": speeds[-1],
                    "tokens_per_second": one.material.train.lengths[rows].sum() / seconds,
                    "memory_bytes": memory_in_use().size,
                    "seconds": time.monotonic() - self.began,
                }
            )
        if live:
            rate = np.asarray(self.experiments[live[0]].schedule(done - 1)).item()
            mean, speed = float(losses[:, live].mean()), sum(speeds)
            self.progress.update(step=done, epoch=epoch, loss=mean, learning_rate=rate, examples_per_second=speed)
        self.window, self.window_start = [], time.monotonic()

    def _end(self, member: int, step: int, what: str) -> None:
        """A member whose numbers are broken is not followed further; the others do not feel it."""
        diverged = [step if i == member else old for i, old in enumerate(self.notes.diverged)]
        self.notes = dataclasses.replace(self.notes, diverged=diverged)
        self.progress.note(f"{self._name(member)}: the {what} at step {step} is not finite; the others go on")

    def _name(self, member: int) -> str:
        return self.experiments[member].folder.name

    def _measured(self, done: int, state: mj.TrainState, interrupt: Interrupt) -> dict[int, dict[str, float]] | None:
        """The metrics of each member that is followed; None if a signal broke the evaluation off."""

        def measure(width: int, batch: Any) -> Any:
            return self.steps.evaluate[width](state, self.population.frozen, batch, self.population.members)

        outputs = run_batches(self.first, measure, lambda: interrupt.signal)
        if outputs is None:
            return None
        outputs, found = jax.device_get(outputs), {}
        for member in self._live():
            own = [jax.tree.map(lambda x, member=member: x[member], one) for one in outputs]
            try:
                found[member] = metrics_of(self.experiments[member], own)
            except FloatingPointError as error:
                self._end(member, done, f"output ({error})")
        return found

    def _evaluate_start(self, state: mj.TrainState, interrupt: Interrupt) -> bool:
        """What the models score before training; False if a signal broke it off."""
        began = time.monotonic()
        found = self._measured(0, state, interrupt)
        if found is None:
            return False
        self._log_evaluation(0, found, time.monotonic() - began, {})
        self.window_start = time.monotonic()
        return True

    def _evaluate(self, done: int, state: mj.TrainState, interrupt: Interrupt) -> bool:
        """Evaluates all members, keeps what is their best, and saves; False if a signal broke it off."""
        began = time.monotonic()
        found = self._measured(done, state, interrupt)
        if found is None:
            self.notes = dataclasses.replace(self.notes, unevaluated=True)
            self._save(state)
            return False
        best = self._take_note(done, found)
        # All before the checkpoint: a run that is killed between these comes here again.
        for member, is_best in best.items():
            if is_best:
                self._keep_best(member, state, found[member])
        self._log_evaluation(done, found, time.monotonic() - began, best)
        self._save(state)
        self.window_start = time.monotonic()
        return True

    def _take_note(self, done: int, found: Mapping[int, Mapping[str, float]]) -> dict[int, bool]:
        """Books an evaluation; for each member whether it is its best so far."""
        name, books, best = self.first.config.metric, list(self.notes.members), {}
        for member, metrics in found.items():
            book = books[member]
            best[member] = is_better(name, metrics[name], book.best)
            news: dict[str, Any] = {"waited": book.waited + 1}
            if best[member]:
                news = {"best": metrics[name], "best_step": done, "waited": 0}
            books[member] = dataclasses.replace(book, **news)
        self.notes = dataclasses.replace(self.notes, members=books, unevaluated=False)
        return best

    def _log_evaluation(
        self, done: int, found: Mapping[int, Mapping[str, float]], seconds: float, best: Mapping[int, bool]
    ) -> None:
        epoch, name = done / self.first.material.plan.steps_per_epoch, self.first.config.metric
        shown = []
        for member, metrics in found.items():
            is_best = best.get(member, False)
            event = {"kind": "eval", "step": done, "epoch": epoch, **metrics, "seconds": seconds, "best": is_best}
            self.logs[member].write(event)
            shown.append(f"{self._name(member)} {metrics[name]:.4f}{'*' if is_best else ''}")
        self.progress.note(f"eval  step {done}  epoch {epoch:.2f}  {name}: {'  '.join(shown)}")

    def _save(self, state: mj.TrainState) -> None:
        self.notes = dataclasses.replace(self.notes, seconds=time.monotonic() - self.began)
        self.checkpoints.save(state, self.notes, self._best_step())

    def _keep_best(self, member: int, state: mj.TrainState, scores: dict[str, float]) -> None:
        one = self.experiments[member]
        nnx.update(one.model, member_state(state, member).trainable)
        save_best(one, scores)

    def _best_step(self) -> int | None:
        """The step at which any member scored best."""
        best: Bookkeeping | None = None
        for book in self.notes.members:
            if book.best is not None and is_better(self.first.config.metric, book.best, best and best.best):
                best = book
        return best and best.best_step
