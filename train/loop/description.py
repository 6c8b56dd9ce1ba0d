"""A run from shapes alone: model, optimizer, loss and batches. Training fills it with arrays, planning does not.

Of the model only config.json is read, so that settings which do not fit it are found at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import melora_jax as mj
from melora_jax.adapters import Adaptation
from melora_jax.models import abstract_model
from train.config.run_config import RunConfig
from train.config.tasks import glue_task
from train.data.batching import Batch
from train.loop.losses import Measurer, make_loss, measurer

TASKS = {"classification": "sequence-classification", "regression": "regression", "causal-lm": "causal-lm"}


@dataclasses.dataclass(frozen=True)
class RunDescription:
    """What a run computes, whatever its data.

    Attributes:
      config: of the run.
      model: the adapted model, with shapes in place of arrays.
      adaptation: which layers are adapted, and how many parameters are trained.
      token_types: whether batches have token_type_ids, which the tokenizer decides.
    """

    config: RunConfig
    model: Any
    adaptation: Adaptation
    token_types: bool = False

    @property
    def measure(self) -> Measurer:
        """What the model's outputs on a batch are worth."""
        return measurer(self.config.model.task, self.config.instruction.chunk)

    @property
    def loss(self) -> Callable[[Any, Batch], tuple[jax.Array, Batch]]:
        """What training minimises, as `melora_jax.make_train_step` takes it."""
        return make_loss(self.measure, self.config.method.penalty())

    def optimizer(
        self, model: nnx.Module, total_steps: int, rates: Mapping[str, Any] | None = None
    ) -> tuple[optax.Schedule, optax.GradientTransformation]:
        """The learning rate by step, and the optimizer.

        Args:
          model: adapted, with arrays or shapes.
          total_steps: of the run.
          rates: settings of [optim] to be taken instead of the run's own; they may be traced.

        Raises:
          ValueError: [adalora] leaves no step in which ranks are chosen.
        """
        optim = dataclasses.replace(self.config.method.optim, **(rates or {}))

        def schedule(peak: float | None) -> optax.Schedule | None:
            return None if peak is None else make_schedule(peak, total_steps, optim.warmup_ratio, optim.schedule)

        main = make_schedule(optim.learning_rate, total_steps, optim.warmup_ratio, optim.schedule)
        tx = mj.make_optimizer(
            model,
            main,
            head_learning_rate=schedule(optim.head_learning_rate),
            b_learning_rate=schedule(optim.b_learning_rate),
            weight_decay=optim.weight_decay,
            b1=optim.beta1,
            b2=optim.beta2,
            eps=optim.epsilon,
            clip_norm=optim.clip_norm,
            rank_budget=self.config.method.rank_budget(total_steps),
        )
        return main, tx

    def batch(self, rows: int, width: int) -> Batch:
        """The shapes and dtypes of a batch of `rows` rows of `width` tokens, as `train.data.dataset.Rows.batch` has."""

        def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        tokens, numbers = array(rows, width), array(rows, dtype=jnp.float32)
        if self.config.model.task == "causal-lm":
            names = ("input_ids", "labels", *(("segment_ids", "position_ids") if self.config.instruction.pack else ()))
            return dict.fromkeys(names, tokens) | {"weights": array(rows, width, dtype=jnp.float32)}
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if self.token_types else ()))
        labels = numbers if self.config.model.task == "regression" else array(rows)
        return dict.fromkeys(names, tokens) | {"labels": labels, "weight": numbers}


def describe_run(config: RunConfig) -> RunDescription:
    """What a run computes, from its configuration and the model's config.json.

    Raises:
      ValueError: the model is not supported or takes fewer tokens, or the adapters do not fit it.
      FileNotFoundError: there is no config.json.
    """
    model = abstract_model(
        config.model.name,
        task=TASKS[config.model.task],
        num_labels=known_labels(config),
        dtype=config.model.dtype,
        remat=config.model.remat,
    )
    if config.data.max_length > model.max_length:
        raise ValueError(
            f"data.max_length={config.data.max_length} is over the {model.max_length} tokens that the model takes; "
            "lower it"
        )
    adaptations: list[Adaptation] = []

    def adapted(model: Any) -> Any:
        if config.model.quantize:
            mj.quantize(model, config.model.quantize)
        adaptations.append(mj.adapt(model, config.method.settings, rngs=nnx.Rngs(0)))
        return model

    model = nnx.eval_shape(adapted, model)
    return RunDescription(config, model, adaptations[-1])


def known_labels(config: RunConfig) -> int | None:
    """The number of classes as far as it is known without the data."""
    glue = glue_task(config.data.name)
    return len(config.data.label_names) or (glue.classes if glue else None)


def make_schedule(peak: float, total: int, warmup_ratio: float, shape: str) -> optax.Schedule:
    """The learning rate by step: a linear rise from 0, then linear or cosine decay to 0 at `total`, or constant.

    >>> rate = make_schedule(1.0, total=10, warmup_ratio=0.2, shape="linear")
    >>> [round(float(rate(step)), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    warmup = int(np.ceil(total * warmup_ratio))
    left = max(1, total - warmup)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, left),
        "cosine": optax.cosine_decay_schedule(peak, left),
        "constant": optax.constant_schedule(peak),
    }[shape]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
