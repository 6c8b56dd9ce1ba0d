"""The training state and the jitted step that updates it, on one device or on a mesh.

`abstract_train_state` describes the initial state by shapes, for models and meshes that need not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import FrozenParam
from melora_jax.adapters.tensor_parallel import factor_spec
from melora_jax.core.dropout import dropout_key
from melora_jax.nn.sharding import batch_sharding, constrain, mesh_of_tree, put, shardings_like, shardings_of, use_mesh
from melora_jax.nn.tree import path_of, walk
from melora_jax.validation import check_count

Batch = Any
Loss = Callable[[nnx.Module, Batch], Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a training step changes.

    Attributes:
      step: the number of finished steps, an int32 scalar.
      trainable: adapters and head, the model's `nnx.Param` state, usually float32.
      opt_state: the optimizer's state, for `trainable` only.
      host: the model's own mutable state, such as BatchNorm statistics and random streams.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> layer = MELoRADense(4, 6, n=2, rngs=nnx.Rngs(0))
    >>> state, _ = train_state(layer, optax.sgd(0.1))
    >>> int(state.step), sorted(state.trainable)
    (0, ['a', 'b'])
    """

    step: jax.Array
    trainable: nnx.State
    opt_state: optax.OptState
    host: nnx.State


def train_state(model: nnx.Module, tx: optax.GradientTransformation) -> tuple[TrainState, nnx.State]:
    """The initial training state and the frozen base, on the mesh that the model lies on.

    The state holds the model's own arrays, and the step donates them. Before you evaluate, save or export the model,
    put the new arrays into it: `nnx.update(model, state.trainable, state.host)`.

    Args:
      model: an adapted model.
      tx: the optimizer, from `make_optimizer` or any other of optax.

    Returns:
      `(state, frozen)`: the `TrainState`, and the `FrozenParam` state that the step reads.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> layer = MELoRADense(4, 6, n=2, rngs=nnx.Rngs(0))
    >>> _, frozen = train_state(layer, optax.sgd(0.1))
    >>> frozen["base"]["kernel"].shape
    (4, 6)
    """
    _, trainable, frozen, host = nnx.split(model, nnx.Param, FrozenParam, ...)
    step, mesh = jnp.zeros((), jnp.int32), mesh_of_tree(trainable)
    if mesh is None:
        return TrainState(step, trainable, tx.init(trainable), host), frozen
    placed = shardings_like(jax.eval_shape(tx.init, trainable), trainable, mesh)
    opt_state = jax.jit(tx.init, out_shardings=placed)(trainable)
    return TrainState(put(step, NamedSharding(mesh, PartitionSpec())), trainable, opt_state, host), frozen


def abstract_train_state(
    model: Any, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh | None = None
) -> tuple[TrainState, nnx.State]:
    """What `train_state` would return for an abstract model, with `jax.ShapeDtypeStruct` in place of arrays.

    Args:
      model: from `abstract_model`, adapted or not (call `adapt` inside `nnx.eval_shape`).
      tx: the optimizer, from `make_optimizer`.
      mesh: a mesh, or an abstract mesh, with axes data, fsdp and tensor. Each shape then has the sharding that its
        array would have; `leaf.sharding.shard_shape(leaf.shape)` is the part that one device holds.

    Returns:
      `(state, frozen)`, as `train_state` returns them.

    Raises:
      ValueError: no sharding rule covers a variable, or an adapter runs on one device only.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from melora_jax.models import abstract_model
    >>> sizes = dict(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
    ...              max_position_embeddings=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ...     model = abstract_model(folder, task="causal-lm")
    >>> mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    >>> state, _ = abstract_train_state(model, optax.sgd(0.1), mesh)
    >>> state.trainable["lm_head"]["kernel"].get_raw_value().sharding.spec
    P('fsdp', 'tensor')
    """
    _, trainable, frozen, host = nnx.split(model, nnx.Param, FrozenParam, ...)
    opt_state = jax.eval_shape(tx.init, trainable)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    if mesh is None:
        return TrainState(step, trainable, opt_state, host), frozen
    places = shardings_on(model, mesh)
    trainable, frozen = (_placed(part, places) for part in (trainable, frozen))
    placed = shardings_like(opt_state, trainable, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    step, opt_state, host = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (step, opt_state, host),
        (whole, placed, jax.tree.map(lambda _: whole, host)),
    )
    return TrainState(step, trainable, opt_state, host), frozen


def make_train_step(
    model: nnx.Module,
    tx: optax.GradientTransformation,
    loss: Loss,
    *,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> jax.stages.Wrapped:
    """The jitted training step `(state, frozen, batch, key) -> (state, metrics)`. It donates `state`.

    Args:
      model: gives the structure; the arrays come in `state` and `frozen` (see `train_state`).
      tx: the optimizer.
      loss: `loss(model, batch)` returns the mean loss of a batch, a scalar, or (loss, dict of scalars). It is traced
        with dropout on. If the dict has a scalar "weight", `accumulate` averages micro-batches by it, so that the step
        equals one over the whole batch however its rows are padded.
      accumulate: the number of micro-batches into which the batch is split along its leading axis.
      mesh: the mesh that the model was loaded on. The batch is then sharded over data and fsdp along its leading axis,
        and every other input and output keeps its sharding.

    Returns:
      The step. Its `batch` is a tree of arrays with the batch as leading axis. Its `key` is one PRNG key for the whole
      run: the step folds in its own number, so that resuming needs no other random state. Metrics are float32 scalars:
      "loss", "grad_norm" (before clipping) and those that `loss` returns.

    Raises:
      ValueError: `accumulate` is below 1 or, when the step is called, does not divide the batch; or the model does not
        lie on `mesh`.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> layer, tx = MELoRADense(4, 6, n=2, rngs=nnx.Rngs(0)), optax.sgd(0.1)
    >>> step = make_train_step(layer, tx, lambda layer, x: (layer(x) ** 2).mean())
    >>> state, frozen = train_state(layer, tx)
    >>> state, metrics = step(state, frozen, jnp.ones((8, 4)), jax.random.key(0))
    >>> int(state.step), sorted(metrics)
    (1, ['grad_norm', 'loss'])
    """
    check_count("accumulate", accumulate)
    graphdef = nnx.split(model, nnx.Param, FrozenParam, ...)[0]
    step = step_of(graphdef, tx, loss, accumulate, mesh)
    return jax.jit(step, donate_argnums=0, **_step_shardings(model, tx, mesh))


def step_of(
    graphdef: Any, tx: optax.GradientTransformation, loss: Loss, accumulate: int, mesh: Mesh | None
) -> Callable[[TrainState, nnx.State, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The training step before `jax.jit`. Arguments as for `make_train_step`; `graphdef` is the model's."""

    def loss_of(trainable: nnx.State, frozen: nnx.State, host: nnx.State, batch: Batch, key: jax.Array) -> Any:
        current = nnx.merge(graphdef, trainable, frozen, host, copy=True)
        with dropout_key(key):
            value = loss(current, batch)
        value, metrics = value if isinstance(value, tuple) else (value, {})
        metrics = {name: jnp.asarray(metric, jnp.float32) for name, metric in (metrics | {"loss": value}).items()}
        return value, (metrics, nnx.split(current, nnx.Param, FrozenParam, ...)[-1])

    gradient = jax.grad(loss_of, has_aux=True)

    def step(state: TrainState, frozen: nnx.State, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        with use_mesh(mesh):
            if accumulate == 1:
                grads, (metrics, host) = gradient(state.trainable, frozen, state.host, batch, key)
            else:
                grads, (metrics, host) = _accumulated(gradient, accumulate, state, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, trainable, opt_state, host), metrics

    return step


def _step_shardings(model: nnx.Module, tx: optax.GradientTransformation, mesh: Mesh | None) -> dict[str, Any]:
    """The `in_shardings` and `out_shardings` of the step on a mesh."""
    if mesh is None:
        return {}
    _, trainable, frozen, host = nnx.split(model, nnx.Param, FrozenParam, ...)
    if mesh_of_tree((trainable, frozen)) != mesh:
        raise ValueError("the model does not lie on this mesh; load it with from_pretrained(..., mesh=mesh)")
    whole: Any = NamedSharding(mesh, PartitionSpec())
    opt_state = shardings_like(jax.eval_shape(tx.init, trainable), trainable, mesh)
    state = TrainState(whole, shardings_of(trainable), opt_state, jax.tree.map(lambda _: whole, host))
    return {"in_shardings": (state, shardings_of(frozen), batch_sharding(mesh), whole), "out_shardings": (state, whole)}


def _accumulated(gradient: Any, count: int, state: TrainState, frozen: nnx.State, batch: Batch, key: jax.Array) -> Any:
    """Gradients and metrics of `count` micro-batches, averaged by weight, and the host state after the last one."""
    micro = jax.tree.map(lambda x: _cut(x, count), batch)

    def one(host: nnx.State, at: Any) -> Any:
        number, part = at
        grads, (metrics, host) = gradient(state.trainable, frozen, host, part, jax.random.fold_in(key, number))
        return host, (grads, metrics, metrics.get("weight", jnp.ones(())))

    host, (grads, metrics, weights) = jax.lax.scan(one, state.host, (jnp.arange(count), micro))
    total = weights.sum()

    def mean(x: jax.Array) -> jax.Array:
        # A micro-batch of padding only has weight 0 and, as its mean is over nothing, a loss of NaN.
        counted = jnp.where(weights.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, 0)
        return jnp.tensordot((weights / total).astype(x.dtype), counted, axes=1)

    means = jax.tree.map(mean, metrics)
    return jax.tree.map(mean, grads), (means | ({"weight": total} if "weight" in means else {}), host)


def _cut(x: jax.Array, count: int) -> jax.Array:
    if x.shape[0] % count:
        raise ValueError(f"accumulate={count} does not divide the batch of {x.shape[0]} rows; choose a divisor, or pad")
    return constrain(x.reshape(count, x.shape[0] // count, *x.shape[1:]), rows=1)


def shardings_on(model: Any, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """The sharding of each variable of a model, adapted or not, by path.

    Raises:
      ValueError: no sharding rule covers a variable, or an adapter runs on one device only.
    """
    specs: dict[str, PartitionSpec] = {}
    for path, layer in walk(model):
        if isinstance(layer, MELoRADense):
            kernel = f"{path_of(path)}/base/{layer.view.kernel_name}"
            spec = factor_spec(model.layout.spec(kernel, layer.kernel_variable.shape, mesh), layer.spec, mesh)
            if layer.one_device and mesh.size > 1:
                kind = type(layer).__name__
                raise ValueError(
                    f"{path_of(path)} is a {kind}, which runs on one device and not on {mesh.size}; plan for one"
                )
            whole = dict.fromkeys(layer.arrays, PartitionSpec())
            specs |= {f"{path_of(path)}/{name}": place for name, place in (whole | {"a": spec, "b": spec}).items()}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = path_of(path)
        if name not in specs:
            specs[name] = model.layout.spec(name, tuple(variable.shape), mesh)
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def _placed(state: nnx.State, places: dict[str, NamedSharding]) -> nnx.State:
    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path_of(path)])

    return jax.tree_util.tree_map_with_path(placed, state)
