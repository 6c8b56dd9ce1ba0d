"""The memory of a run on one device of a mesh, from abstract shapes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

import melora_jax as mj
from melora_jax.training import abstract_train_state
from train.config.run_config import RunConfig
from train.data.batching import Batch
from train.lab.memory.devices import rows_a_device
from train.lab.memory.liveness import bytes_of, peak_bytes
from train.loop.description import describe_run

_STEPS = 100_000  # of a run whose data is not read: it sets AdaLoRA's schedule, on which no size depends


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


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of this many devices, which need not exist."""
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


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
    run = describe_run(config)
    _, tx = run.optimizer(run.model, config.train.max_steps or _STEPS)
    state, frozen = abstract_train_state(run.model, tx, mesh)
    step = mj.make_train_step(run.model, tx, run.loss)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return AbstractRun(run.model, step, (state, frozen, run.batch(rows, config.data.max_length), key))


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
