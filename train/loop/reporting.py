"""What a run says, on the screen and in its log; of many processes the first one alone speaks."""

from __future__ import annotations

import io

import jax
from rich.console import Console

from train.hosts.hosts import is_first
from train.loop.setup import Experiment
from train.report.terminal import Progress
from train.run_folder.folder import resume_command
from train.run_folder.log import MetricsLog, NoLog


def make_progress(experiment: Experiment, start: int) -> Progress:
    """The progress line, from step `start` on."""
    console = None if is_first() else Console(quiet=True, file=io.StringIO())
    return Progress(experiment.total_steps, experiment.config.train.epochs, start_step=start, console=console)


def make_log(experiment: Experiment, resume_step: int | None, unevaluated: bool) -> MetricsLog | NoLog:
    """The run's log; arguments as `MetricsLog` has them."""
    board = experiment.config.train.tensorboard
    return MetricsLog(experiment.folder, board, resume_step, unevaluated) if is_first() else NoLog()


def introduce(experiment: Experiment, progress: Progress, start: int) -> None:
    """What the run is made of, before its first step."""
    progress.note(str(experiment.adaptation))
    for note in experiment.material.notes:
        progress.note(note)
    widths = ", ".join(map(str, experiment.material.plan.widths))
    progress.note(
        f"{experiment.total_steps:,} steps of {experiment.config.train.batch_size} rows; compiling widths {widths}"
    )
    if jax.process_count() > 1:
        command = resume_command(experiment.folder)
        progress.note(f"{jax.process_count()} processes; should one be lost, continue, on every host, with: {command}")
    if start:
        progress.note(f"resuming after step {start:,}")
