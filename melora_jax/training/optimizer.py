"""The optimizer by kind of parameter, and the jitted training step.

`make_optimizer` is an `optax.multi_transform` over the labels "a", "b", "base", "head" and "frozen". It is an ordinary
optax transformation, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` takes it too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from melora_jax.adapters.params import BaseParam, FrozenParam, MELoRAParam
from melora_jax.core.dropout import dropout_key
from melora_jax.nn.sharding import batch_sharding, constrain, mesh_of_tree, put, shardings_like, shardings_of, use_mesh
from melora_jax.nn.tree import path_of
from melora_jax.training.rank_allocator import RankBudget, within_budget
from melora_jax.validation import check_count

Label = Literal["a", "b", "base", "head", "frozen"]
Batch = Any
Loss = Callable[[nnx.Module, Batch], Any]
Metrics = dict[str, jax.Array]


def labels_of(model: nnx.Module) -> Callable[[Any], Any]:
    """A function from any tree of the model's variables to the same tree of labels.

    "b" are factors B, "a" all else of adapters, "base" is what is trained of the base, "head" every other `nnx.Param`,
    "frozen" all the rest.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> layer = MELoRADense(4, 6, n=2, rngs=nnx.Rngs(0))
    >>> nnx.to_pure_dict(labels_of(layer)(nnx.state(layer, nnx.Param)))
    {'a': 'a', 'b': 'b'}
    """
    variables = nnx.to_flat_state(nnx.state(model))
    known: dict[str, Label] = {path_of(path): _label(path_of(path), variable) for path, variable in variables}

    def label(path: Any, _: Any) -> Label:
        name = path_of(path)
        if name not in known:
            raise ValueError(
                f"{name} is no variable of the model that the optimizer was made for; call make_optimizer on this model"
            )
        return known[name]

    return lambda tree: jax.tree_util.tree_map_with_path(label, tree)


def _label(path: str, variable: Any) -> Label:
    if isinstance(variable, MELoRAParam):
        return "b" if path.rpartition("/")[2] == "b" else "a"  # DoRA's norms and AdaLoRA's diagonal too
    if isinstance(variable, BaseParam):
        return "base"
    return "head" if isinstance(variable, nnx.Param) else "frozen"


def make_optimizer(
    model: nnx.Module,
    learning_rate: optax.ScalarOrSchedule,
    *,
    head_learning_rate: optax.ScalarOrSchedule | None = None,
    b_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    rank_budget: RankBudget | None = None,
) -> optax.GradientTransformation:
    """AdamW with one learning rate for A, B and the head each; the frozen base gets no update and no state.

    Args:
      model: an adapted model; its variables' paths and types give the labels.
      learning_rate: of A, of the base, and of what has none of its own; a number or an optax schedule.
      head_learning_rate: of `modules_to_save` (the authors take half of `learning_rate`).
      b_learning_rate: of B (LoRA+, arXiv 2402.12354, takes 16 times `learning_rate`).
      weight_decay: decoupled, on everything trained (the authors: 0.01, torch's default).
      b1, b2, eps: Adam's.
      clip_norm: largest global norm of the trainables' gradients together; `None` does not clip.
      rank_budget: how many latents AdaLoRA keeps; needed where the adapters are AdaLoRA's, to be what the paper says.

    Returns:
      An optax transformation for the trainable tree, or for the model's whole tree.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> layer = MELoRADense(4, 6, n=2, rngs=nnx.Rngs(0))
    >>> tx = make_optimizer(layer, 1e-3, head_learning_rate=5e-4)
    >>> optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    """
    labels = labels_of(model)

    def adamw(rate: optax.ScalarOrSchedule | None) -> optax.GradientTransformation:
        rate = learning_rate if rate is None else rate
        return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    trained: dict[Hashable, optax.GradientTransformation] = {
        "a": adamw(None),
        "b": adamw(b_learning_rate),
        "head": adamw(head_learning_rate),
        "frozen": optax.set_to_zero(),
    }
    if nnx.to_flat_state(nnx.state(model, BaseParam)):
        trained["base"] = adamw(None)
    update = optax.multi_transform(trained, labels)
    if rank_budget is not None:
        update = within_budget(model, update, rank_budget)
    if clip_norm is None:
        return update
    # A whole-tree caller's frozen gradients are zeroed first, so that they do not count in the norm.
    nothing: dict[Hashable, optax.GradientTransformation] = dict.fromkeys(trained, optax.identity())
    without_frozen = optax.multi_transform(nothing | {"frozen": optax.set_to_zero()}, labels)
    return optax.chain(without_frozen, optax.clip_by_global_norm(clip_norm), update)


class TrainState(NamedTuple):
    """What a training step changes.

    Attributes:
      step: number of finished steps, int32.
      trainable: factors and head, the state of `nnx.Param`.
      opt_state: optimizer state, for the trainables alone.
      host: the host model's own mutable state (BatchNorm statistics, its own random streams).
    """

    step: jax.Array
    trainable: nnx.State
    opt_state: optax.OptState
    host: nnx.State


def train_state(model: nnx.Module, tx: optax.GradientTransformation) -> tuple[TrainState, nnx.State]:
    """The start of training: (state, frozen), on the mesh that the model lies on.

    The state holds the model's own arrays, which a donating step deletes: `nnx.update(model, state.trainable,
    state.host)` puts the new ones into the model before it is evaluated, saved or exported.
    """
    _, trainable, frozen, host = nnx.split(model, nnx.Param, FrozenParam, ...)
    step, mesh = jnp.zeros((), jnp.int32), mesh_of_tree(trainable)
    if mesh is None:
        return TrainState(step, trainable, tx.init(trainable), host), frozen
    placed = shardings_like(jax.eval_shape(tx.init, trainable), trainable, mesh)
    opt_state = jax.jit(tx.init, out_shardings=placed)(trainable)
    return TrainState(put(step, NamedSharding(mesh, PartitionSpec())), trainable, opt_state, host), frozen


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
      model: gives the structure; its arrays come in `state` and `frozen` (see `train_state`).
      tx: the optimizer.
      loss: `loss(model, batch)` returns the mean loss of a batch, a scalar, or (loss, dict of scalars). It is traced
        with dropout on. A scalar named "weight" says how much the batch counts: with `accumulate`, micro-batches are
        averaged by it, so that the step equals one over the whole batch however rows are padded.
      accumulate: number of micro-batches that the leading axis of the batch is cut into.
      mesh: the mesh that the model was loaded on. The batch's leading axes are then shared out over data and fsdp, and
        everything that the step takes and returns keeps its place.

    Raises:
      ValueError: `accumulate` is below 1 or, at the call, does not divide the batch; or the model is not on `mesh`.

    Returns:
      The step. `key` is one key for the run: the step folds in its own number, so resuming needs no other random
      state. Metrics are those of `loss`, "loss" and "grad_norm" (before clipping), float32 scalars.
    """
    check_count("accumulate", accumulate)
    graphdef = nnx.split(model, nnx.Param, FrozenParam, ...)[0]
    step = step_of(graphdef, tx, loss, accumulate, mesh)
    return jax.jit(step, donate_argnums=0, **_step_shardings(model, tx, mesh))


def step_of(
    graphdef: Any, tx: optax.GradientTransformation, loss: Loss, accumulate: int, mesh: Mesh | None
) -> Callable[[TrainState, nnx.State, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """The training step before it is jitted; arguments as for `make_train_step`, `graphdef` is the model's."""

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
    """The step's `in_shardings` and `out_shardings` on a mesh."""
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
    """Gradients, metrics and host state of `count` micro-batches run one after another, averaged by weight."""
    micro = jax.tree.map(lambda x: _cut(x, count), batch)

    def one(host: nnx.State, at: Any) -> Any:
        number, part = at
        grads, (metrics, host) = gradient(state.trainable, frozen, host, part, jax.random.fold_in(key, number))
        return host, (grads, metrics, metrics.get("weight", jnp.ones(())))

    host, (grads, metrics, weights) = jax.lax.scan(one, state.host, (jnp.arange(count), micro))
    total = weights.sum()

    def mean(x: jax.Array) -> jax.Array:
        # A micro-batch of padding alone has no loss: a mean over nothing, which weight 0 does not make a number.
        counted = jnp.where(weights.reshape(-1, *[1] * (x.ndim - 1)) > 0, x, 0)
        return jnp.tensordot((weights / total).astype(x.dtype), counted, axes=1)

    means = jax.tree.map(mean, metrics)
    return jax.tree.map(mean, grads), (means | ({"weight": total} if "weight" in means else {}), host)


def _cut(x: jax.Array, count: int) -> jax.Array:
    if x.shape[0] % count:
        raise ValueError(f"accumulate={count} does not divide the batch of {x.shape[0]} rows; choose a divisor, or pad")
    return constrain(x.reshape(count, x.shape[0] // count, *x.shape[1:]), rows=1)
