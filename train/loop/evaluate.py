"""Evaluation on the held-out rows: every row, or every token that counts, counts once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from melora_jax import TrainState
from train.config.metrics import compute_metrics
from train.data.batching import Batch
from train.loop.losses import Measure
from train.loop.setup import Experiment

_AHEAD = 3  # batches dispatched before the oldest is waited for: the device never waits, and stopping is prompt


def evaluate(
    experiment: Experiment,
    eval_steps: Mapping[int, Any],
    state: TrainState,
    frozen: nnx.State,
    stopping: Callable[[], object] = lambda: False,
) -> dict[str, float] | None:
    """The metrics of the run's task and the mean loss.

    Args:
      eval_steps: compiled evaluation steps by batch width.
      stopping: asked before each batch whether to break off.

    Returns:
      The metrics; None if it was broken off.

    Raises:
      FloatingPointError: predictions or a loss that are not finite.
    """
    outputs = run_batches(experiment, lambda width, batch: eval_steps[width](state, frozen, batch), stopping)
    return None if outputs is None else metrics_of(experiment, outputs)


def run_batches(
    experiment: Experiment, measure: Callable[[int, Batch], Measure], stopping: Callable[[], object]
) -> list[Measure] | None:
    """What `measure`, of a width and a batch that wide, gives for the held-out rows; None if it was broken off."""
    rows, outputs = experiment.material.validation, []
    for batch in experiment.material.held_out:
        if stopping():
            return None
        outputs.append(measure(batch.width, experiment.feed(rows, batch)))
        jax.block_until_ready(outputs[max(0, len(outputs) - 1 - _AHEAD)].total if len(outputs) > _AHEAD else ())
    return outputs


def metrics_of(experiment: Experiment, outputs: Sequence[Measure]) -> dict[str, float]:
    """The metrics and the mean loss, from what was measured on each held-out batch.

    Raises:
      FloatingPointError: as for `evaluate`.
    """
    material = experiment.material
    loss = sum(float(one.total) for one in outputs) / sum(float(one.weight) for one in outputs)
    if not np.isfinite(loss):
        # Of logits that are not finite argmax still makes a class.
        raise FloatingPointError(f"the held-out loss is {loss}")
    if material.labels is None:
        return {"loss": loss, "perplexity": float(np.exp(loss))}
    predictions = np.empty(len(material.labels), np.asarray(outputs[0].predictions).dtype)
    for batch, one in zip(material.held_out, outputs, strict=True):
        real = batch.indices >= 0
        predictions[batch.indices[real]] = np.asarray(one.predictions)[real]
    return {"loss": loss} | compute_metrics(experiment.config.metrics, predictions, material.labels)
