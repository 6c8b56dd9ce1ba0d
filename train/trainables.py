"""How many parameters a run would train, from its model's config.json alone."""

from __future__ import annotations

from typing import Any

from flax import nnx

import melora_jax as mj
from train.config import RunConfig
from train.experiment import TASKS
from train.glue import glue_task


def count_trainables(config: RunConfig) -> mj.Adaptation:
    """What `melora_jax.adapt` would report of the run's model, whose weights are not needed.

    Raises:
      ValueError, FileNotFoundError: no such model, or settings that do not fit it.
    """
    glue = glue_task(config.data.name)
    classes = len(config.data.label_names) or (glue.classes if glue else None)

    def adapted(model: Any) -> Any:
        mj.adapt(model, config.melora, rngs=nnx.Rngs(0))
        return model

    model = mj.abstract_model(config.model.name, task=TASKS[config.model.task], num_labels=classes)
    return mj.describe(nnx.eval_shape(adapted, model))
