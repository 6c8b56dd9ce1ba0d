"""Evaluation on the held-out rows: every row, or every token that counts, counts once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from melora_jax import TrainState
from train.experiment import Experiment
from train.metrics import compute_metrics


def evaluate(
    experiment: Experiment, eval_steps: Mapping[int, Any], state: TrainState, frozen: nnx.State
) -> dict[str, float]:
    """The metrics of the run's task and the mean loss.

    Args:
      eval_steps: compiled evaluation steps by batch width.

    Raises:
      FloatingPointError: predictions or a loss that are not finite.
    """
    material, rows = experiment.material, experiment.material.validation
    # All are dispatched before the first is fetched, so that the device does not wait for the host.
    outputs = [eval_steps[batch.width](state, frozen, rows.batch(batch)) for batch in material.held_out]
    loss = sum(float(one.total) for one in outputs) / sum(float(one.weight) for one in outputs)
    if not np.isfinite(loss):
        # Of logits that are not finite argmax still makes a class.
        raise FloatingPointError(f"the held-out loss is {loss}")
    if material.labels is None:
        return {"loss": loss, "perplexity": float(np.exp(loss))}
    predictions = np.empty(len(material.labels), outputs[0].predictions.dtype)
    for batch, one in zip(material.held_out, outputs, strict=True):
        real = batch.indices >= 0
        predictions[batch.indices[real]] = np.asarray(one.predictions)[real]
    return {"loss": loss} | compute_metrics(experiment.config.metrics, predictions, material.labels)
