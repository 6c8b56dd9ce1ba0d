"""The training loop, of a lone run and of a population: set up, for each step, evaluate, keep the best, save, stop."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import jax

from train.hosts.interrupt import Interrupt, make_interrupt
from train.loop.bookkeeping import Book, Outcome, open_book
from train.loop.cohort import Cohort, Steps, lone_run
from train.loop.evaluate import measure_held_out, metrics_of
from train.loop.setup import Experiment
from train.process import keep_freed_memory
from train.run_folder.errors import HostLostError, RunError
from train.run_folder.folder import resume_command


def run(experiment: Experiment, resume: bool = False) -> Outcome:
    """Trains from the start, or from the newest checkpoint, to the end or to a signal.

    Raises:
      ValueError: the folder holds another run, or nothing to resume; nothing was changed.
      RunError: a loss that is not finite, or a disk that refuses. Earlier checkpoints stay.
    """
    return train(lone_run(experiment), resume)[0]


def train(cohort: Cohort, resume: bool) -> list[Outcome]:
    """Trains a cohort as `run` does a run; how each member ended.

    Raises:
      ValueError: the checkpoint is of other runs.
      RunError: as for `run`; a member of a population whose loss is not finite ends alone.
    """
    with open_book(cohort, resume) as book, make_interrupt() as interrupt:
        loop = _Loop(cohort, cohort.compile(), book, interrupt)
        keep_freed_memory()
        book.start_clock()
        try:
            return loop.train()
        except OSError as error:
            raise RunError(
                f"{error}; {book.checkpoints.describe_latest()}; make room and continue with: {book.command}"
            ) from error
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            raise HostLostError(error, book.checkpoints.describe_latest(), book.command) from error


@dataclasses.dataclass
class _Loop:
    """The loop itself, with all that it needs."""

    cohort: Cohort
    steps: Steps
    book: Book
    interrupt: Interrupt

    def train(self) -> list[Outcome]:
        """All steps that are left."""
        cohort, book, interrupt, config = self.cohort, self.book, self.interrupt, self.cohort.first.config.train
        start, total = int(cohort.state.step), cohort.first.total_steps
        due = book.notes.unevaluated or (config.eval_at_start and start == 0)
        if due and not self.evaluate(start):
            return book.outcomes(start, interrupt.signal())
        for done in range(start + 1, total + 1):
            if not book.live():
                book.explain_early_stop()
                return book.outcomes(done - 1)
            rows, batch = cohort.batch(done - 1)
            step = self.steps.train[rows[0].width]
            cohort.state, metrics = step(cohort.state, cohort.frozen, batch, *cohort.arguments)
            book.add(metrics, rows)
            due = done % cohort.first.eval_every == 0 or done == total
            stop = interrupt.signal()  # asked once: a signal that comes later finds the next step
            if done % config.log_every == 0 or due or stop:
                book.report(done)
            if due:
                stop = None if self.evaluate(done) else interrupt.signal()
            elif stop:
                book.save()
            if stop:
                return book.outcomes(done, stop)
        return book.outcomes(total)

    def evaluate(self, done: int) -> bool:
        """Evaluates each member, keeps those that score their best, and saves; False if a signal stopped it."""
        began = time.monotonic()
        measured = measure_held_out(self.cohort, self.steps.evaluate, self.interrupt.signal)
        if measured is None:
            if done:
                self.book.save(unevaluated=True)
            return False
        found = {}
        for member in self.book.live():
            try:
                found[member] = metrics_of(self.cohort.members[member], measured[member])
            except FloatingPointError as error:
                self.book.end(member, done, f"output ({error})")
        self.book.evaluated(done, found, time.monotonic() - began)
        return True


def exit_code(outcome: Outcome) -> int:
    """0, or 128 plus the signal's number as shells report it."""
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def describe_stop(outcome: Outcome, folder: Path) -> str:
    """What to tell somebody whose run was interrupted."""
    name = signal.Signals(outcome.stopped_by).name if outcome.stopped_by else ""
    where = f"after step {outcome.step}, which is saved" if outcome.step else "before the first step"
    return f"stopped by {name} {where}; continue with: {resume_command(folder)}"
