"""Evaluation on the held-out rows: every row, or every token that counts, counts once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from train.loop.cohort import Cohort
from train.loop.losses import Measure
from train.loop.metrics import compute_metrics
from train.loop.setup import Experiment

_AHEAD = 3  # batches dispatched before the oldest is waited for: the device never waits, and stopping is prompt


def measure_held_out(
    cohort: Cohort, steps: Mapping[int, Any], stopping: Callable[[], object]
) -> list[list[Measure]] | None:
    """What each member's model gives for each batch of the held-out rows.

    Args:
      cohort: as it is now.
      steps: compiled evaluation steps by batch width.
      stopping: asked before each batch whether to stop.

    Returns:
      The measures by member; None if it was stopped.
    """
    first, outputs = cohort.first, []
    for rows in first.material.held_out:
        if stopping():
            return None
        batch = first.feed(first.material.validation, rows)
        outputs.append(steps[rows.width](cohort.state, cohort.frozen, batch, *cohort.evaluate_arguments))
        if len(outputs) > _AHEAD:
            jax.block_until_ready(outputs[-1 - _AHEAD].total)
    by_batch = [cohort.by_member(one) for one in jax.device_get(outputs)]
    return [list(own) for own in zip(*by_batch, strict=True)]


def metrics_of(experiment: Experiment, outputs: Sequence[Measure]) -> dict[str, float]:
    """The metrics and the mean loss of a run, from what was measured on each held-out batch.

    Raises:
      FloatingPointError: predictions or a loss that are not finite.
    """
    material = experiment.material
    loss = sum(float(one.total) for one in outputs) / sum(float(one.weight) for one in outputs)
    if not np.isfinite(loss):
        # argmax makes a class even of logits that are not finite.
        raise FloatingPointError(f"the held-out loss is {loss}")
    if material.labels is None:
        return {"loss": loss, "perplexity": float(np.exp(loss))}
    predictions = np.empty(len(material.labels), np.asarray(outputs[0].predictions).dtype)
    for batch, one in zip(material.held_out, outputs, strict=True):
        real = batch.indices >= 0
        predictions[batch.indices[real]] = np.asarray(one.predictions)[real]
    return {"loss": loss} | compute_metrics(experiment.config.metrics, predictions, material.labels)
