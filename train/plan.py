"""`python -m train plan`: whether a run fits into the memory of its devices, from shapes alone.

Neither weights nor an accelerator are needed, and of the model only its config.json: the training step is traced on
abstract arrays, and `liveness` says what it holds at its fullest moment.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

import melora_jax as mj
from train.config import RunConfig, from_toml
from train.devices import GIB, Devices, devices_from_name, rows_a_device
from train.experiment import TASKS
from train.liveness import bytes_of, peak_bytes
from train.step import Batch, make_loss, measurer


@dataclasses.dataclass(frozen=True)
class Options:
    """Say whether a run fits into memory. Further options are those of `run`."""

    recipe: Annotated[str, tyro.conf.Positional]
    """The run's recipe; of its model, config.json is enough."""
    device: tuple[str, ...]
    """What it shall run on: v5e-8, v5p-8, h100x8, cpu ...; several are compared."""
    data: int = 1
    """Devices on the mesh axis data."""
    tensor: int = 1
    """Devices on the mesh axis tensor; all others are on fsdp."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device.

    Attributes:
      base: the frozen parameters.
      gathered: one layer's kernels, put together from their shards for its products; 0 without fsdp.
      trainable: adapters and head.
      optimizer: its state.
      gradients: those of the trainables.
      batch: the rows.
      activations: the rest of what the step holds at its fullest moment: what the backward pass needs, workspace, and
        the logits of a chunk.
    """

    base: int
    gathered: int
    trainable: int
    optimizer: int
    gradients: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


def plan(words: Sequence[str]) -> int:
    """Prints the plan; the exit code is 0 if the run fits on each of the devices, else 1."""
    options, overrides = tyro.cli(
        Options, args=list(words), prog="python -m train plan", return_unknown_args=True, use_underscores=True
    )
    config = from_toml(options.recipe, overrides)
    kinds = [devices_from_name(name) for name in options.device]
    kept = functools.cache(lambda mesh, cpu: plan_run(config, mesh, cpu=cpu))
    plans = [kept(_mesh(devices, options), devices.kind == "cpu") for devices in kinds]
    console = Console()
    console.print(_describe(config), highlight=False, soft_wrap=True)
    console.print(_table(options.device, kinds, plans))
    fits = True
    for name, devices, found in zip(options.device, kinds, plans, strict=True):
        if found.total > devices.usable:
            fits = False
            console.print(
                f"{name}: does not fit; {'; or '.join(_remedies(config, found))}", highlight=False, soft_wrap=True
            )
    return 0 if fits else 1


def _mesh(devices: Devices, options: Options) -> AbstractMesh:
    if options.data < 1 or options.tensor < 1 or devices.count % (options.data * options.tensor):
        raise ValueError(
            f"--data {options.data} and --tensor {options.tensor} do not divide {devices.count} x {devices.kind}; "
            "their product must"
        )
    return abstract_mesh(options.data, devices.count // (options.data * options.tensor), options.tensor)


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of so many devices that need not be there."""
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def plan_run(config: RunConfig, mesh: AbstractMesh, *, cpu: bool = False) -> Plan:
    """The memory of a run on one device of a mesh.

    Args:
      config: the run's.
      mesh: its devices.
      cpu: whether these are CPUs, on which XLA widens bfloat16 (see `peak_bytes`).

    Raises:
      ValueError, FileNotFoundError: whatever is wrong with the model's config.json, the adapter or the batch.
    """
    rows = rows_a_device(config.train.batch_size, config.train.accumulate, mesh)
    run = abstract_run(config, rows, mesh)
    state, frozen, batch, _ = run.arguments
    cut = _cut_sizes(run.model, (frozen, state.trainable), mesh.shape["tensor"])

    def size(aval: Any) -> int:
        return bytes_of(aval) // (mesh.shape["tensor"] if cut & set(aval.shape[1:]) else 1)

    program = jax.make_jaxpr(run.step)(*run.arguments)
    peak = peak_bytes(program, size, donated=len(jax.tree.leaves(state)), cpu=cpu)
    gradients = _bytes(state.trainable)
    return Plan(
        base=_bytes(frozen),
        gathered=_largest_layer(frozen, mesh.shape["fsdp"]),
        trainable=gradients,
        optimizer=_bytes(state.opt_state),
        gradients=gradients,
        batch=sum(map(bytes_of, batch.values())) * config.train.accumulate,
        activations=max(0, peak - gradients),
    )


class AbstractRun(NamedTuple):
    """A run's model, training step and the step's arguments, with shapes in place of arrays."""

    model: Any
    step: Any
    arguments: tuple[mj.TrainState, nnx.State, Batch, Any]


def abstract_run(config: RunConfig, rows: int, mesh: AbstractMesh | None = None) -> AbstractRun:
    """The run of a configuration, a step of it taking `rows` of the longest rows; its state as it lies on `mesh`."""
    model = _abstract_model(config)
    tx = mj.make_optimizer(model, config.optim.learning_rate, clip_norm=config.optim.clip_norm)
    state, frozen = mj.abstract_train_state(model, tx, mesh)
    step = mj.make_train_step(model, tx, make_loss(measurer(config.model.task, config.instruction.chunk)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return AbstractRun(model, step, (state, frozen, _abstract_batch(config, rows), key))


def _abstract_model(config: RunConfig) -> Any:
    """The adapted model, with shapes in place of arrays."""
    names = config.data.label_names

    def adapted(model: Any) -> Any:
        if config.model.quantize:
            mj.quantize(model, config.model.quantize)
        mj.adapt(model, config.melora, rngs=nnx.Rngs(0))
        return model

    model = mj.abstract_model(
        config.model.name,
        task=TASKS[config.model.task],
        num_labels=len(names) or None,
        dtype=config.model.dtype,
        remat=config.model.remat,
    )
    return nnx.eval_shape(adapted, model)


def _abstract_batch(config: RunConfig, rows: int) -> Batch:
    """A batch of the longest rows, as `Rows.batch` makes them."""

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    length = config.data.max_length
    batch: Batch = {"input_ids": array(rows, length)}
    if config.model.task == "causal-lm":
        batch |= {"labels": array(rows, length), "weights": array(rows, length, dtype=jnp.float32)}
        if config.instruction.pack:
            batch |= {"segment_ids": array(rows, length), "position_ids": array(rows, length)}
        return batch
    label = jnp.float32 if config.model.task == "regression" else jnp.int32
    batch["attention_mask"] = array(rows, length)
    return batch | {"labels": array(rows, dtype=label), "weight": array(rows, dtype=jnp.float32)}


def _bytes(tree: Any) -> int:
    """What one device holds of the arrays of a tree."""
    return sum(map(_own_bytes, jax.tree.leaves(tree)))


def _own_bytes(leaf: Any) -> int:
    return bytes_of(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))


def _cut_sizes(model: Any, tree: Any, tensor: int) -> set[int]:
    """The sizes of the axes that tensor cuts: of kernels and so of what they give, and of heads."""
    heads = {count for count in (model.layout.heads, model.layout.kv_heads) if count % tensor == 0}
    leaves = jax.tree.leaves(tree)
    cut = {
        size for leaf in leaves for size, axis in zip(leaf.shape, leaf.sharding.spec, strict=False) if axis == "tensor"
    }
    return heads | cut if tensor > 1 else set()


def _largest_layer(frozen: nnx.State, fsdp: int) -> int:
    """Bytes of the numbered layer that has the most, gathered from its shards over fsdp; 0 where there are none."""
    layers: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        numbered = re.match(r".*?/\d+/", jax.tree_util.keystr(path, simple=True, separator="/"))
        if numbered and fsdp > 1:
            parts = fsdp if "fsdp" in leaf.sharding.spec else 1
            layers[numbered[0]] = layers.get(numbered[0], 0) + parts * _own_bytes(leaf)
    return max(layers.values(), default=0)


def _describe(config: RunConfig) -> str:
    parts = f" in {config.train.accumulate} parts" if config.train.accumulate > 1 else ""
    rows = f"{config.train.batch_size} rows of {config.data.max_length} tokens a step{parts}"
    return f"{config.model.name}, {config.model.dtype}, remat {config.model.remat}, {rows}"


def _table(names: Sequence[str], kinds: Sequence[Devices], plans: Sequence[Plan]) -> Table:
    table = Table("GiB a device", box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    for field in dataclasses.fields(Plan):
        table.add_row(field.name, *(f"{getattr(found, field.name) / GIB:.3f}" for found in plans))
    table.add_row("total", *(f"{found.total / GIB:.3f}" for found in plans))
    table.add_row("usable", *(f"{devices.usable / GIB:.1f}" for devices in kinds))
    verdicts = [found.total <= devices.usable for found, devices in zip(plans, kinds, strict=True)]
    table.add_row("fits", *("yes" if fits else "no" for fits in verdicts))
    return table


def _remedies(config: RunConfig, found: Plan) -> list[str]:
    """What to change, the largest part of the memory first."""
    remedies = []
    if config.model.dtype == "float32":
        remedies.append("halve base and activations with --model.dtype bfloat16")
    if config.model.quantize is None:
        remedies.append("hold the base in 4 bits with --model.quantize nf4")
    if config.model.task == "causal-lm" and config.model.remat != "full":
        remedies.append("keep only each layer's input with --model.remat full")
    if config.train.batch_size > config.train.accumulate:
        remedies.append("take fewer rows at once with a larger --train.accumulate")
    shard = "take more devices, over which fsdp divides the base"
    return [shard, *remedies] if found.base > found.activations else [*remedies, shard]
