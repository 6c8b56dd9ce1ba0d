"""What a loop remembers and tells of its members: logs, the best so far, patience, divergence, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from train.config.run_config import to_toml
from train.hosts.hosts import is_first, meet
from train.loop.best import save_best
from train.loop.checkpoint import Checkpoints, MemberNotes, Notes
from train.loop.cohort import Cohort
from train.loop.identity import check_folder, enter_folders
from train.loop.metrics import is_better
from train.loop.reporting import introduce, make_log, make_progress, show_evaluation
from train.report.terminal import Progress, memory_in_use
from train.run_folder.errors import RunError
from train.run_folder.folder import resume_command
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


@contextlib.contextmanager
def open_book(cohort: Cohort, resume: bool) -> Iterator[Book]:
    """Puts the newest checkpoint, if there is one, into the cohort, and opens what is written while it trains.

    Raises:
      ValueError: the checkpoint, or a member's folder, is of another run; nothing was changed.
    """
    if cohort.at_once is None:  # a population has looked before it claimed its folders
        check_folder(cohort.folder, resume)
        meet("every process has looked at the folder that the first one is about to change")
    command = resume_command(cohort.folder)
    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(Checkpoints(cohort.folder / "checkpoints"))
        notes = checkpoints.notes()
        enter_folders(cohort.members, notes, resume)
        # A run that was killed before its first checkpoint begins again, and none of its events counts.
        logged = -1 if resume else None
        if notes is None:
            notes = Notes.start([to_toml(member.config) for member in cohort.members])
        else:
            cohort.state = checkpoints.restore(cohort.state)
            logged = int(cohort.state.step)
        progress = opened.enter_context(make_progress(cohort))
        logs = [opened.enter_context(make_log(member, logged, notes.unevaluated)) for member in cohort.members]
        introduce(cohort, progress, command)
        yield Book(cohort, checkpoints, logs, progress, notes, command)


@dataclasses.dataclass
class Book:
    """The books of one part of a training, from its start, or its resumption, to its end; `command` continues it."""

    cohort: Cohort
    checkpoints: Checkpoints
    logs: Sequence[MetricsLog | NoLog]
    progress: Progress
    notes: Notes
    command: str
    window: list[tuple[dict[str, jax.Array], list[np.ndarray]]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_clock()

    def start_clock(self) -> None:
        """To be called when the steps are compiled: from here on, time is the run's."""
        self.window_start = time.monotonic()
        self.began = self.window_start - self.notes.seconds

    def live(self) -> list[int]:
        """The members that have neither diverged nor waited out their patience."""
        patience = self.cohort.first.config.train.patience
        ends = enumerate(self.notes.members)
        return [i for i, one in ends if one.diverged is None and (patience is None or one.waited < patience)]

    def explain_early_stop(self) -> None:
        """Says why no member is trained further."""
        waited = max(one.waited for one in self.notes.members)
        metric = self.cohort.first.config.metric
        self.progress.note(
            f"stopped early: no better {metric} in {waited} evaluations" if waited else "stopped early: all diverged"
        )

    def add(self, metrics: dict[str, jax.Array], rows: Sequence[Any]) -> None:
        """A step was dispatched. Waits for all but the two newest: the device never idles, and a signal acts soon."""
        examples = [one.material.train.examples(own) for one, own in zip(self.cohort.members, rows, strict=True)]
        self.window.append((metrics, examples))
        if len(self.window) > 2:
            jax.block_until_ready(self.window[-3][0])

    def report(self, done: int) -> None:
        """Fetches the metrics of the steps since the last report, and logs them for each member.

        Raises:
          RunError: those of a lone run are not finite.
        """
        fetched = [jax.device_get(metrics) for metrics, _ in self.window]
        losses, norms = (np.stack([one[name] for one in fetched]) for name in ("loss", "grad_norm"))
        losses, norms = (values.reshape(len(fetched), -1) for values in (losses, norms))
        for member in self.live():
            finite = np.isfinite(losses[:, member])
            broken = ~(finite & np.isfinite(norms[:, member]))
            if broken.any():
                at = int(broken.argmax())
                self.end(member, done - len(fetched) + 1 + at, "gradient norm" if finite[at] else "loss")
        seconds = max(time.monotonic() - self.window_start, 1e-9)
        epoch = done / self.cohort.first.material.plan.steps_per_epoch
        live, speeds = self.live(), []
        for member in live:
            one = self.cohort.members[member]
            rows = np.concatenate([examples[member] for _, examples in self.window])
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
            rate = np.asarray(self.cohort.members[live[0]].schedule(done - 1)).item()
            mean, speed = float(losses[:, live].mean()), sum(speeds)
            self.progress.update(step=done, epoch=epoch, loss=mean, learning_rate=rate, examples_per_second=speed)
        self.window, self.window_start = [], time.monotonic()

    def end(self, member: int, step: int, what: str) -> None:
        """Ends a member whose numbers are not finite; the other members of a population don't feel it.

        Raises:
          RunError: it is a lone run.
        """
        if self.cohort.at_once is None:
            raise RunError(
                f"the {what} at step {step} is not finite; {self.checkpoints.describe_latest()}; start again with a "
                "lower optim.learning_rate or more warm-up"
            )
        self._note_member(member, diverged=step)
        name = self.cohort.members[member].folder.name
        self.progress.note(f"{name}: the {what} at step {step} is not finite; the others continue")

    def evaluated(self, done: int, found: Mapping[int, dict[str, float]], seconds: float) -> None:
        """Logs an evaluation, keeps the model of each member that scored its best, and saves a checkpoint.

        One before the first step is logged alone: it is no candidate for the best.
        """
        best = {member: bool(done) and self._note_score(done, member, found[member]) for member in found}
        epoch = done / self.cohort.first.material.plan.steps_per_epoch
        # All before the checkpoint: a run that is killed between these evaluates again.
        for member, metrics in found.items():
            if best[member]:
                self._keep_best(member, metrics)
            event = {"kind": "eval", "step": done, "epoch": epoch, **metrics, "seconds": seconds, "best": best[member]}
            self.logs[member].write(event)
        if done:
            self.save()
        show_evaluation(self.progress, self.cohort, done, epoch, found, best)
        self.window_start = time.monotonic()

    def save(self, unevaluated: bool = False) -> None:
        """Saves a checkpoint of the cohort as it is now, `unevaluated` if an evaluation is due first thing."""
        self.notes = dataclasses.replace(self.notes, seconds=time.monotonic() - self.began, unevaluated=unevaluated)
        self.checkpoints.save(self.cohort.state, self.notes, self._best_step())

    def outcomes(self, done: int, stopped_by: int | None = None) -> list[Outcome]:
        """How each member ended."""
        live = self.live()
        ends = [done if i in live else one.diverged or self._waited_at(one) for i, one in enumerate(self.notes.members)]
        pairs = zip(self.notes.members, ends, strict=True)
        return [Outcome(one.best, step, stopped_by, one.diverged) for one, step in pairs]

    def _note_score(self, done: int, member: int, metrics: Mapping[str, float]) -> bool:
        """Whether a member's evaluation is its best so far."""
        name, old = self.cohort.first.config.metric, self.notes.members[member]
        best = is_better(name, metrics[name], old.best)
        news = {"best": metrics[name], "best_step": done, "waited": 0} if best else {"waited": old.waited + 1}
        self._note_member(member, **news)
        return best

    def _note_member(self, member: int, **news: Any) -> None:
        members = list(self.notes.members)
        members[member] = dataclasses.replace(members[member], **news)
        self.notes = dataclasses.replace(self.notes, members=members)

    def _keep_best(self, member: int, scores: Mapping[str, float]) -> None:
        one = self.cohort.members[member]
        nnx.update(one.model, self.cohort.trained(member))
        if is_first():
            save_best(one, scores)

    def _waited_at(self, one: MemberNotes) -> int:
        """The step of the evaluation at which a member had waited out its patience."""
        every = self.cohort.first.eval_every
        return min(((one.best_step or 0) // every + one.waited) * every, self.cohort.first.total_steps)

    def _best_step(self) -> int | None:
        """The step at which any member scored best."""
        best: MemberNotes | None = None
        for one in self.notes.members:
            if one.best is not None and is_better(self.cohort.first.config.metric, one.best, best and best.best):
                best = one
        return best and best.best_step
