"""What a cohort says, on the screen and in its logs; of many processes the first one alone speaks."""

from __future__ import annotations

import io
from collections.abc import Mapping

import jax
from rich.console import Console

from train.hosts.hosts import is_first
from train.loop.cohort import Cohort
from train.loop.setup import Experiment
from train.report.terminal import Progress
from train.run_folder.log import MetricsLog, NoLog


def make_progress(cohort: Cohort) -> Progress:
    """The progress line, from the cohort's step on."""
    console, first = None if is_first() else Console(quiet=True, file=io.StringIO()), cohort.first
    start = int(cohort.state.step)
    return Progress(first.total_steps, first.config.train.epochs, start_step=start, console=console)


def make_log(experiment: Experiment, resume_step: int | None, unevaluated: bool) -> MetricsLog | NoLog:
    """The run's log; arguments as `MetricsLog` has them."""
    board = experiment.config.train.tensorboard
    return MetricsLog(experiment.folder, board, resume_step, unevaluated) if is_first() else NoLog()


def introduce(cohort: Cohort, progress: Progress, command: str) -> None:
    """What the runs are made of, before their first step, and which command continues them."""
    first, start = cohort.first, int(cohort.state.step)
    progress.note(str(first.adaptation))
    for note in first.material.notes:
        progress.note(note)
    widths = ", ".join(map(str, first.material.plan.widths))
    progress.note(f"{first.total_steps:,} steps of {first.config.train.batch_size} rows; compiling widths {widths}")
    if jax.process_count() > 1:
        progress.note(f"{jax.process_count()} processes; should one be lost, continue, on every host, with: {command}")
    if start:
        progress.note(f"resuming after step {start:,}")
    if cohort.at_once is not None:
        progress.note(f"{len(cohort.members)} members in one step, {cohort.at_once} at a time")


def show_evaluation(
    progress: Progress,
    cohort: Cohort,
    done: int,
    epoch: float,
    found: Mapping[int, Mapping[str, float]],
    best: Mapping[int, bool],
) -> None:
    """The metrics of a lone run, or of each member the one that ranks."""
    if cohort.at_once is None:
        for member, metrics in found.items():
            progress.evaluation(done, epoch, metrics, best[member])
        return
    name = cohort.first.config.metric
    scores = [
        f"{cohort.members[member].folder.name} {metrics[name]:.4f}{'*' if best[member] else ''}"
        for member, metrics in found.items()
    ]
    progress.note(f"eval  step {done}  epoch {epoch:.2f}  {name}: {'  '.join(scores)}")
