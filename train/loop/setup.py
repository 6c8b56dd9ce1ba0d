"""A run's parts, made and checked before the first step: data, model, adapters, optimizer, batches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import melora_jax as mj
from melora_jax.adapters import Adaptation
from melora_jax.training import RankBudget, check_mesh
from train.config.methods import rank_budget, with_method
from train.config.run_config import RunConfig
from train.config.schema import OptimConfig
from train.data.dataset import Material, read_material
from train.data.feed import Feed, make_feed
from train.hosts.hosts import own_share
from train.loop.losses import Measurer, measurer

TASKS = {"classification": "sequence-classification", "regression": "regression", "causal-lm": "causal-lm"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run needs."""

    config: RunConfig
    material: Material
    measure: Measurer
    model: nnx.Module
    adaptation: Adaptation
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    mesh: Mesh | None
    feed: Feed

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return _total_steps(self.config, self.material)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.config.train.eval_every or self.material.plan.steps_per_epoch

    def key(self) -> jax.Array:
        """The key of the run's dropout, on all its devices."""

        def draw() -> jax.Array:
            return dropout_key(self.config)

        return draw() if self.mesh is None else jax.jit(draw, out_shardings=NamedSharding(self.mesh, jax.P()))()

    @property
    def data_name(self) -> str:
        """What the run is trained on: a data set's name, or a file's."""
        data = self.config.data
        return data.name or Path(data.train or "").name

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.config.output.folder)


def dropout_key(config: RunConfig) -> jax.Array:
    """The key of a run's dropout."""
    return jax.random.fold_in(jax.random.key(config.train.seed), 2)


def prepare(config: RunConfig, beside: Experiment | None = None) -> Experiment:
    """Reads the data and the model, adapts it, and plans the batches.

    Args:
      config: of the run.
      beside: another member of its population, whose data it shares.

    Raises:
      ValueError, FileNotFoundError: whatever is wrong with the data, the checkpoint or the adapter's settings.
    """
    mesh = _mesh(config)
    material = read_material(config, own_share()) if beside is None else _reordered(beside.material, config)
    task = TASKS[config.model.task]
    if mesh is not None:
        check_mesh(config.model.name, config.melora, mesh, task=task, num_labels=material.num_labels)
    seed = jax.random.key(config.train.seed)
    model = mj.from_pretrained(
        config.model.name,
        task=task,
        num_labels=material.num_labels,
        dtype=config.model.dtype,
        remat=config.model.remat,
        rngs=nnx.Rngs(jax.random.fold_in(seed, 0)),
        mesh=mesh,
    )
    _check_fit(model, config, material)
    if config.model.quantize:
        mj.quantize(model, config.model.quantize)
    adaptation = mj.adapt(model, config.melora, rngs=nnx.Rngs(jax.random.fold_in(seed, 1)))
    if config.mesh.whole_factors == "error" and adaptation.notes:
        raise ValueError(
            f"{adaptation.notes[0]}, which mesh.whole_factors=error forbids; choose n as a multiple of mesh.tensor, or "
            "leave these layers out of adapter.targets"
        )
    if config.train.warm_start:
        mj.warm_start(model, config.train.warm_start)
    if config.model.stack_layers:
        material = dataclasses.replace(material, notes=(*material.notes, str(mj.stack_layers(model))))
    total = _total_steps(config, material)
    optim, budget = with_method(config.optim, config.adapter), rank_budget(config, total)
    schedule, tx = make_tx(model, optim, total, budget)
    measure = measurer(config.model.task, config.instruction.chunk)
    return Experiment(config, material, measure, model, adaptation, schedule, tx, mesh, make_feed(mesh))


def _mesh(config: RunConfig) -> Mesh | None:
    """The mesh of a run, None for one device; its batches must share out evenly."""
    if jax.process_count() == 1 and set(config.mesh.sizes.values()) == {1}:
        return None
    try:
        mesh = mj.make_mesh(**config.mesh.sizes)
    except ValueError as error:
        raise ValueError(f"[mesh] {error}") from None
    parts, sizes = mesh.shape["data"] * mesh.shape["fsdp"], config.train
    for key, rows, of in (
        ("batch_size", sizes.batch_size, parts * sizes.accumulate),
        ("eval_batch_size", sizes.eval_batch_size, parts),
    ):
        if rows % of:
            accumulated = f" times train.accumulate={sizes.accumulate}" if of > parts else ""
            raise ValueError(
                f"train.{key}={rows} rows can't be shared out evenly to mesh.data × mesh.fsdp = {parts}"
                f"{accumulated}; choose a multiple of {of}"
            )
    return mesh


def _reordered(material: Material, config: RunConfig) -> Material:
    """The same rows in the order of another run."""
    return dataclasses.replace(material, plan=material.plan.reseeded(config.data_seed))


def _check_fit(model: Any, config: RunConfig, material: Material) -> None:
    """The tokens must be the model's, and not more a row than it takes."""
    if config.data.max_length > model.max_length:
        raise ValueError(
            f"data.max_length={config.data.max_length} is over the {model.max_length} tokens that the model takes; "
            "lower it"
        )
    rows = model.config["vocab_size"]
    if material.most_id >= rows:
        raise ValueError(
            f"the tokenizer of {config.model.name} gives the id {material.most_id}, and the model's embedding has "
            f"{rows} rows; put the tokenizer of this checkpoint into its folder"
        )


def _total_steps(config: RunConfig, material: Material) -> int:
    steps = config.train.epochs * material.plan.steps_per_epoch
    return min(steps, config.train.max_steps or steps)


def make_tx(
    model: nnx.Module, optim: OptimConfig, total: int, budget: RankBudget | None = None
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by step, and the optimizer, of a run of `total` steps; numbers in `optim` may be traced."""

    def schedule(peak: float | None) -> optax.Schedule | None:
        return None if peak is None else make_schedule(peak, total, optim.warmup_ratio, optim.schedule)

    main = make_schedule(optim.learning_rate, total, optim.warmup_ratio, optim.schedule)
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
        rank_budget=budget,
    )
    return main, tx


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
