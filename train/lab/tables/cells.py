"""The runs of a table's row, trained as one population; finished runs are kept, and interrupted ones resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.config.run_config import RunConfig
from train.loop.best import finish
from train.loop.loop import Outcome, describe_stop, run
from train.loop.population import run_population
from train.loop.setup import prepare
from train.report.report import FILE_NAME


def run_cells(configs: Sequence[RunConfig], folder: Path, command: Sequence[str]) -> Outcome | None:
    """Trains runs that differ only in numbers, except for those that are finished.

    Args:
      configs: the runs' configurations.
      folder: for what several runs share as a population.
      command: the words of the command that resumes it.

    Returns:
      None, or the outcome of a run that a signal stopped.
    """
    if all(is_finished(Path(config.output.folder)) for config in configs):
        return None
    if len(configs) == 1:
        return _run_alone(configs[0])
    outcomes = run_population(configs, folder, command, resume=folder.exists())
    if stopped := next((outcome for outcome in outcomes if outcome.stopped_by), None):
        return stopped
    for config in configs:
        if not is_finished(Path(config.output.folder)):
            raise ValueError(
                f"{folder} lists its runs as finished, but {config.output.folder} is not; remove both to train again"
            )
    return None


def _run_alone(config: RunConfig) -> Outcome | None:
    experiment = prepare(config)
    outcome = run(experiment, resume=_is_started(experiment.folder))
    if outcome.stopped_by:
        print(describe_stop(outcome, experiment.folder))
        return outcome
    finish(experiment)
    return None


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` is complete: its report is written last."""
    return (folder / FILE_NAME).exists()


def _is_started(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()
