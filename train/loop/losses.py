"""What a model's outputs are worth: the losses of a batch, for training and for evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from melora_jax import FrozenParam, TrainState
from melora_jax.training import chunked_cross_entropy
from train.data.batching import Batch


class Measure(NamedTuple):
    """Σ weight · loss over a batch and Σ weight, float32 scalars; predictions [b], where a task has them."""

    total: jax.Array
    weight: jax.Array
    predictions: jax.Array | None


Measurer = Callable[[Any, Batch], Measure]


def measure_classification(model: Any, batch: Batch) -> Measure:
    """Cross-entropy of the rows of weight 1; the likeliest class."""
    logits = _outputs(model, batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return Measure((losses * batch["weight"]).sum(), batch["weight"].sum(), logits.argmax(-1))


def measure_regression(model: Any, batch: Batch) -> Measure:
    """Squared error of the rows of weight 1; the value."""
    values = _outputs(model, batch)[:, 0]
    return Measure((((values - batch["labels"]) ** 2) * batch["weight"]).sum(), batch["weight"].sum(), values)


def measure_text(model: Any, batch: Batch, chunk: int) -> Measure:
    """Cross-entropy of the next tokens, `chunk` tokens' logits at a time."""
    hidden = model.hidden(
        batch["input_ids"], position_ids=batch.get("position_ids"), segment_ids=batch.get("segment_ids")
    )
    total, _ = chunked_cross_entropy(hidden, model.logits, batch["labels"], batch["weights"], chunk)
    return Measure(total, batch["weights"].sum(), None)


def measurer(task: str, chunk: int) -> Measurer:
    """The measure of a task, a value of `model.task`."""
    measures: dict[str, Measurer] = {
        "classification": measure_classification,
        "regression": measure_regression,
        "causal-lm": functools.partial(measure_text, chunk=chunk),
    }
    return measures[task]


def make_loss(
    measure: Measurer, penalty: Callable[[Any], jax.Array] | None = None
) -> Callable[[Any, Batch], tuple[jax.Array, Batch]]:
    """The mean loss, and what a method adds to it, as `melora_jax.make_train_step` takes it."""

    def loss(model: Any, batch: Batch) -> tuple[jax.Array, Batch]:
        total, weight, _ = measure(model, batch)
        # A micro-batch may be padding alone; its mean is then 0, at weight 0.
        mean = total / jnp.maximum(weight, 1.0)
        return (mean if penalty is None else mean + penalty(model)), {"weight": weight}

    return loss


def make_eval_step(model: nnx.Module, measure: Measurer, mesh: Mesh | None = None) -> Any:
    """The jitted `(state, frozen, batch) -> Measure`, dropout off; on a mesh every device has all of the measure."""
    graphdef = nnx.split(model, nnx.Param, FrozenParam, ...)[0]

    def evaluate(state: TrainState, frozen: nnx.State, batch: Batch) -> Measure:
        current = nnx.merge(graphdef, state.trainable, frozen, state.host, copy=True)
        current.eval()
        return measure(current, batch)

    return jax.jit(evaluate, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _outputs(model: Any, batch: Batch) -> jax.Array:
    """Logits [b, labels] in float32, or values [b, 1]."""
    logits = model(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
    return logits.astype(jnp.float32)
