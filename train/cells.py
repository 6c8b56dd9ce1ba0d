"""The runs of a table, one after another; what is finished is kept, and what was broken off goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.config import RunConfig
from train.experiment import prepare
from train.finish import finish
from train.loop import Outcome, describe_stop, run
from train.report import FILE_NAME


def run_cells(configs: Sequence[RunConfig]) -> Outcome | None:
    """Trains each configuration to its end, unless its folder holds the finished run.

    Returns:
      None, or how the run ended that a signal stopped.
    """
    for config in configs:
        folder = Path(config.output.folder)
        if is_finished(folder):
            continue
        experiment = prepare(config)
        outcome = run(experiment, resume=is_started(folder))
        if outcome.stopped_by:
            print(describe_stop(outcome, folder))
            return outcome
        finish(experiment)
    return None


def is_finished(folder: Path) -> bool:
    """Whether a run in `folder` came to its end: its report is written last."""
    return (folder / FILE_NAME).exists()


def is_started(folder: Path) -> bool:
    """Whether `folder` holds a run that can be resumed."""
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()
