"""The best model of a run, on disk, and what is made of it after the last step: its export, its spectra, the report.

The best is the adapter and what else was trained, or the whole model where all of it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import melora_jax as mj
from melora_jax.checkpoints import spectra
from melora_jax.nn import unstack_layers
from train.loop.setup import Experiment
from train.report.report import write_report
from train.run_folder.errors import RunError
from train.run_folder.folder import read_run, resume_command
from train.run_folder.log import replace_text

ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"


def save_best(experiment: Experiment, scores: Mapping[str, float]) -> None:
    """Writes what the model holds as the run's best, in place of an earlier one.

    Raises:
      OSError: the disk refuses; the earlier one stays.
    """
    model: Any = experiment.model
    if experiment.config.method.settings.train_base:
        mj.save_pretrained(model, experiment.folder / MODEL_FOLDER)
    else:
        mj.save_adapter(model, experiment.folder / ADAPTER_FOLDER, scores=scores, data=experiment.data_name)


def finish(experiment: Experiment) -> list[str]:
    """Puts the best of the run into the model and writes all that is made of it.

    Returns:
      Lines to print: what is where, and the commands that use it.

    Raises:
      RunError: the disk refuses; the best itself was saved during the run.
    """
    try:
        return _write_results(experiment)
    except OSError as error:
        again = resume_command(experiment.folder)
        raise RunError(f"{error}; training is done and saved; make room and finish with: {again}") from error


def _best_scores(folder: Path) -> dict[str, float]:
    run = read_run(folder)
    best = run.best or {}
    return {name: float(best[name]) for name in run.metrics if name in best}


def _write_results(experiment: Experiment) -> list[str]:
    folder = experiment.folder
    best = _load_best(experiment)
    lines = [f"{best.name:9}{best}"]
    if experiment.adaptation.sites:
        mj.export_peft(experiment.model, folder / "peft", scores=_best_scores(folder), data=experiment.data_name)
        lines.append(f"PEFT     {folder / 'peft'}")
    by_path = {path: values.tolist() for path, values in spectra(experiment.model).items()}
    replace_text(folder / "spectra.json", json.dumps(by_path) + "\n")
    lines.append(f"report   {write_report(folder)}")
    return lines


def _load_best(experiment: Experiment) -> Path:
    """Puts the best adapter into the model, unstacked; returns where the best lies. A whole model is left there."""
    if experiment.config.method.settings.train_base:
        return experiment.folder / MODEL_FOLDER
    unstack_layers(experiment.model)
    mj.load_adapter(experiment.model, experiment.folder / ADAPTER_FOLDER)
    return experiment.folder / ADAPTER_FOLDER
