"""Compiling ahead: one executable for each batch width, so that nothing compiles in mid-run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Lowered

from melora_jax import TrainState, make_train_step
from melora_jax.nn import batch_sharding
from train.config.methods import penalty
from train.data.batching import Batch
from train.loop.losses import make_eval_step, make_loss
from train.loop.setup import Experiment

_AT_ONCE = 4  # compilations in parallel; each takes about a core and some hundred MB


@dataclasses.dataclass(frozen=True)
class Steps:
    """Executables by batch width."""

    train: Mapping[int, Any]
    evaluate: Mapping[int, Any]


def compile_steps(experiment: Experiment, state: TrainState, frozen: nnx.State, key: jax.Array) -> Steps:
    """The training step for each width of the plan, the evaluation step for each width of the held-out rows."""
    measure, mesh, parts = experiment.measure, experiment.mesh, experiment.config.train.accumulate
    loss = make_loss(measure, penalty(experiment.config))
    step = make_train_step(experiment.model, experiment.tx, loss, accumulate=parts, mesh=mesh)
    eval_step = make_eval_step(experiment.model, measure, mesh)
    return compile_widths(
        experiment,
        lambda batch: step.lower(state, frozen, batch, key),
        lambda batch: eval_step.lower(state, frozen, batch),
    )


def compile_widths(
    experiment: Experiment, train: Callable[[Batch], Lowered], evaluate: Callable[[Batch], Lowered]
) -> Steps:
    """Executables of steps that are lowered for an abstract batch of each width."""
    material, mesh = experiment.material, experiment.mesh
    batch = material.train.batch(material.plan.batch(0))
    lowered = {("train", width): train(_of_width(batch, width, mesh)) for width in material.plan.widths}
    batch = material.validation.batch(material.held_out[0])
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for width in {rows.width for rows in material.held_out}:
            lowered["evaluate", width] = evaluate(_of_width(batch, width, mesh))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        compiled = dict(zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True))
    by_kind = {kind: {w: run for (k, w), run in compiled.items() if k == kind} for kind in ("train", "evaluate")}
    return Steps(**by_kind)


def _of_width(batch: Batch, width: int, mesh: Mesh | None) -> Batch:
    """The shapes and dtypes of a batch like `batch`, [b, t] arrays `width` wide."""
    where = None if mesh is None else batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((len(x), width) if x.ndim == 2 else x.shape, x.dtype, sharding=where)
        for name, x in batch.items()
    }
