"""`python -m train plan`: whether a run fits into the memory of its devices, from shapes alone.

Neither weights nor an accelerator are needed, and of the model only its config.json: the training step is traced on
abstract arrays, and `liveness` says what it holds at its fullest moment.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import melora_jax as mj
from train.config import RunConfig, from_toml
from train.devices import GIB, Devices, Shares, devices_from_name, rows_a_device, wide_axes
from train.experiment import TASKS
from train.liveness import bytes_of, peak_bytes
from train.methods import penalty, rank_budget
from train.step import Batch, make_loss, measurer

_STEPS = 100_000  # of a run whose data is not read: it sets AdaLoRA's schedule, on which no size depends


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
    meshes = [_shares(devices, options) for devices in kinds]
    found = {mesh: plan_run(config, mesh) for mesh in dict.fromkeys(meshes)}
    plans = [found[mesh] for mesh in meshes]
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


def _shares(devices: Devices, options: Options) -> Shares:
    if options.data < 1 or options.tensor < 1 or devices.count % (options.data * options.tensor):
        raise ValueError(
            f"--data {options.data} and --tensor {options.tensor} do not divide {devices.count} x {devices.kind}; "
            "their product must"
        )
    return Shares(options.data, devices.count // (options.data * options.tensor), options.tensor)


def plan_run(config: RunConfig, shares: Shares) -> Plan:
    """The memory of a run on one device of a mesh.

    Raises:
      ValueError, FileNotFoundError: whatever is wrong with the model's config.json, the adapter or the batch.
    """
    rows = rows_a_device(config.train.batch_size, config.train.accumulate, shares)
    run = abstract_run(config, rows)
    wide = wide_axes(run.model.config)

    def size(aval: Any) -> int:
        return bytes_of(aval) // shares.of_activation(aval.shape, wide)

    peak = peak_bytes(jax.make_jaxpr(run.step)(*run.arguments), size)
    state, frozen, batch, _ = run.arguments
    gradients = _bytes(state.trainable, shares)
    return Plan(
        base=_bytes(frozen, shares),
        gathered=_largest_layer(frozen) // shares.tensor if shares.fsdp > 1 else 0,
        trainable=gradients,
        optimizer=_bytes(state.opt_state, shares),
        gradients=gradients,
        batch=_bytes(batch, Shares()) * config.train.accumulate,
        activations=max(0, peak - gradients),
    )


class AbstractRun(NamedTuple):
    """A run's model, training step and the step's arguments, with shapes in place of arrays."""

    model: Any
    step: Any
    arguments: tuple[mj.TrainState, nnx.State, Batch, Any]


def abstract_run(config: RunConfig, rows: int) -> AbstractRun:
    """The run of a configuration, a step of it taking `rows` of the longest rows."""
    model = adapted_shapes(config)
    budget = rank_budget(config, config.train.max_steps or _STEPS)
    tx = mj.make_optimizer(model, config.optim.learning_rate, clip_norm=config.optim.clip_norm, rank_budget=budget)
    _, trainable, frozen, host = nnx.split(model, nnx.Param, mj.FrozenParam, ...)
    step_number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = mj.TrainState(step_number, trainable, jax.eval_shape(tx.init, trainable), host)
    loss = make_loss(measurer(config.model.task, config.instruction.chunk), penalty(config))
    step = mj.make_train_step(model, tx, loss)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return AbstractRun(model, step, (state, frozen, _abstract_batch(config, rows), key))


def adapted_shapes(config: RunConfig) -> Any:
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


def _bytes(tree: Any, shares: Shares) -> int:
    """Bytes on one device of all arrays of a tree; those with three axes are factors or their moments."""

    def one(leaf: Any) -> int:
        parts = shares.of_factor(leaf.shape) if len(leaf.shape) == 3 else shares.of_base(leaf.shape)
        return -(-bytes_of(leaf) // parts)

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def _largest_layer(frozen: nnx.State) -> int:
    """Bytes of the numbered layer that has the most."""
    layers: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
        numbered = re.match(r".*?/\d+/", jax.tree_util.keystr(path, simple=True, separator="/"))
        if numbered:
            layers[numbered[0]] = layers.get(numbered[0], 0) + bytes_of(leaf)
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
