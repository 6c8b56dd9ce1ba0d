"""After the last step: the best of the run, its export, its spectra and the report."""

from __future__ import annotations

import json
from pathlib import Path

import melora_jax as mj
from melora_jax.checkpoints import spectra
from train.loop.best import load_best
from train.loop.setup import Experiment
from train.report.report import write_report
from train.run_folder.errors import RunError
from train.run_folder.folder import read_run, resume_command
from train.run_folder.log import replace_text


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
    best = load_best(experiment)
    lines = [f"{best.name:9}{best}"]
    if experiment.adaptation.sites:
        mj.export_peft(experiment.model, folder / "peft", scores=_best_scores(folder), data=experiment.data_name)
        lines.append(f"PEFT     {folder / 'peft'}")
    by_path = {path: values.tolist() for path, values in spectra(experiment.model).items()}
    replace_text(folder / "spectra.json", json.dumps(by_path) + "\n")
    lines.append(f"report   {write_report(folder)}")
    return lines
