"""The best model of a run so far, on disk: its adapter and what else was trained, or the whole of it where all was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import melora_jax as mj
from melora_jax.nn import unstack_layers
from train.loop.setup import Experiment

ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"


def save_best(experiment: Experiment, scores: Mapping[str, float]) -> None:
    """Writes what the model holds as the run's best, in place of an earlier one.

    Raises:
      OSError: the disk refuses; the earlier one stays.
    """
    model: Any = experiment.model
    if experiment.config.melora.train_base:
        mj.save_pretrained(model, experiment.folder / MODEL_FOLDER)
    else:
        mj.save_adapter(model, experiment.folder / ADAPTER_FOLDER, scores=scores, data=experiment.data_name)


def load_best(experiment: Experiment) -> Path:
    """Puts the best adapter into the model, unstacked; returns where the best lies. A whole model is left there."""
    if experiment.config.melora.train_base:
        return experiment.folder / MODEL_FOLDER
    unstack_layers(experiment.model)
    mj.load_adapter(experiment.model, experiment.folder / ADAPTER_FOLDER)
    return experiment.folder / ADAPTER_FOLDER
