"""A run's parts, made and checked before the first step: data, model, adapters, optimizer, batches."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

import melora_jax as mj
from melora_jax.adapters import Adaptation
from melora_jax.training import check_mesh
from train.config.run_config import RunConfig
from train.data.dataset import Material, read_material
from train.data.feed import Feed, make_feed
from train.hosts.hosts import own_share
from train.loop.description import TASKS, RunDescription, describe_run, known_labels


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a run needs: its description, filled with data and arrays."""

    run: RunDescription
    material: Material
    model: nnx.Module
    adaptation: Adaptation
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    mesh: Mesh | None
    feed: Feed

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.run.config

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return _total_steps(self.config, self.material)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return self.config.train.eval_every or self.material.plan.steps_per_epoch

    @property
    def data_name(self) -> str:
        """What the run is trained on: a data set's name, or a file's."""
        data = self.config.data
        return data.name or Path(data.train or "").name

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.config.output.folder)


def prepare(config: RunConfig, beside: Experiment | None = None) -> Experiment:
    """Describes the run, reads the data, loads and adapts the model, and plans the batches.

    Args:
      config: of the run.
      beside: another member of its population, whose description and data it shares.

    Raises:
      ValueError, FileNotFoundError: whatever is wrong with the adapter's settings, the data or the checkpoint. What
        shapes alone tell is found before data and weights are read.
    """
    mesh = _mesh(config)
    if beside is not None:
        run = dataclasses.replace(beside.run, config=config)
        material = _reordered(beside.material, config)
    else:
        run, material = _describe_and_read(config, mesh)
    seed = jax.random.key(config.train.seed)
    model = mj.from_pretrained(
        config.model.name,
        task=TASKS[config.model.task],
        num_labels=material.num_labels,
        dtype=config.model.dtype,
        remat=config.model.remat,
        rngs=nnx.Rngs(jax.random.fold_in(seed, 0)),
        mesh=mesh,
    )
    if config.model.quantize:
        mj.quantize(model, config.model.quantize)
    adaptation = mj.adapt(model, config.method.settings, rngs=nnx.Rngs(jax.random.fold_in(seed, 1)))
    if config.mesh.whole_factors == "error" and adaptation.notes:
        raise ValueError(
            f"{adaptation.notes[0]}, which mesh.whole_factors=error forbids; choose n as a multiple of mesh.tensor, or "
            "leave these layers out of adapter.targets"
        )
    if config.train.warm_start:
        mj.warm_start(model, config.train.warm_start)
    if config.model.stack_layers:
        material = dataclasses.replace(material, notes=(*material.notes, str(mj.stack_layers(model))))
    schedule, tx = run.optimizer(model, _total_steps(config, material))
    return Experiment(run, material, model, adaptation, schedule, tx, mesh, make_feed(mesh))


def _describe_and_read(config: RunConfig, mesh: Mesh | None) -> tuple[RunDescription, Material]:
    """First what shapes tell, then the data, and whether the two fit."""
    share = own_share()
    with quietly():  # loading says it all again
        run = share.together(lambda: describe_run(config))
    if mesh is not None:
        task = TASKS[config.model.task]
        check_mesh(config.model.name, config.method.settings, mesh, task=task, num_labels=known_labels(config))
    material = read_material(config, share)
    rows = run.model.config["vocab_size"]
    if material.most_id >= rows:
        raise ValueError(
            f"the tokenizer of {config.model.name} gives the id {material.most_id}, and the model's embedding has "
            f"{rows} rows; put the tokenizer of this checkpoint into its folder"
        )
    token_types = "token_type_ids" in material.validation.batch(material.held_out[0])
    return dataclasses.replace(run, token_types=token_types), material


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


def _total_steps(config: RunConfig, material: Material) -> int:
    steps = config.train.epochs * material.plan.steps_per_epoch
    return min(steps, config.train.max_steps or steps)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What the library logs meanwhile is not shown: it was, or will be."""
    logger = logging.getLogger("melora_jax")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
