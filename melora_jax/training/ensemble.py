"""Populations: many runs of one model in one jitted step, their adapters and heads vmapped over one frozen base.

Members may differ in start, in the key of their dropout, in what the optimizer is made of (learning rates, weight
decay), in alpha and in the rate of the adapters' dropout. A product with a frozen kernel is one product over the rows
of all members, and those of the adapters are batched::

    members = make_members(keys, optim={"rate": rates}, alpha=factors, dropout=rates)
    state, frozen = population_state(models, make_tx, members)
    step = make_population_step(model, make_tx, loss)
    state, metrics = step(state, frozen, batch, members)          # metrics [m]
    lone = member_state(state, 3)                              # the state of one member's lone run

What sets shapes or code (n, r, mixer, targets, the optimizer's kind) is the same for all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import FrozenParam, MELoRAParam
from melora_jax.core.dropout import adapter_dropout, rounded_rate
from melora_jax.core.platform import platform
from melora_jax.core.products.plan import unmerged
from melora_jax.nn.sharding import mesh_of_tree
from melora_jax.nn.tree import path_of, walk
from melora_jax.training.step import Batch, Loss, Metrics, TrainState, step_of
from melora_jax.validation import check_count

Streams = Literal["shared", "own"]
Optimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]


class Members(NamedTuple):
    """What the members of a population differ in; `make_members` makes it.

    Attributes:
      key: of each member's dropout, as `make_train_step` takes one, [m].
      optim: what each member's optimizer is made of, a tree of [m] arrays; None where one serves all.
      alpha: each member's alpha over that of the model, [m]; None where all have the model's.
      dropout: each member's rate of the adapters' dropout, [m]; None where all have the model's.
    """

    key: jax.Array
    optim: Any = None
    alpha: jax.Array | None = None
    dropout: jax.Array | None = None


def make_members(
    keys: Sequence[jax.Array] | jax.Array,
    *,
    optim: Any = None,
    alpha: Sequence[float] | None = None,
    dropout: Sequence[float] | None = None,
) -> Members:
    """`Members` from Python numbers.

    Args:
      keys: a PRNG key each.
      optim: a tree of sequences, one number a member each, such as `{"rate": [1e-3, 2e-3]}`.
      alpha: each member's alpha over the alpha that the model was adapted with. The update is linear in it, so B is
        multiplied by it wherever the model runs: exact for a power of two, else to a rounding.
      dropout: each member's rate, rounded to a multiple of 1/65536 as everywhere.

    Raises:
      ValueError: no members, other than one value a member, or a value out of range.

    >>> members = make_members(jax.random.split(jax.random.key(0), 2), optim={"rate": [1e-3, 2e-3]}, dropout=[0.0, 0.5])
    >>> members.key.shape, members.dropout.tolist()
    ((2,), [0.0, 0.5])
    """
    keys = list(keys)
    if not keys:
        raise ValueError("a population of no members; give one key a member")
    for name, values in (("alpha", alpha), ("dropout", dropout), *_named(optim)):
        if values is not None and np.shape(values) != (len(keys),):
            raise ValueError(f"{name} has shape {np.shape(values)} for {len(keys)} members; give one number a member")
    for factor in alpha or ():
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"alpha={factor!r} must be above 0 and finite: a member's alpha over the model's")
    for rate in dropout or ():
        if not 0 <= rate < 1:
            raise ValueError(f"dropout={rate!r} must be at least 0 and below 1")
    return Members(
        key=jnp.stack(keys),
        optim=jax.tree.map(_floats, optim, is_leaf=_is_values),
        alpha=None if alpha is None else _floats(alpha),
        dropout=None if dropout is None else _floats([rounded_rate(rate) for rate in dropout]),
    )


def population_state(models: Iterable[nnx.Module], tx: Optimizer, members: Members) -> tuple[TrainState, nnx.State]:
    """The start of training a population: (state, frozen).

    Args:
      models: one adapted model a member, in order, whose factors and head are that member's start. The first one's base
        serves all; of the others, which may be made one after another, only the trainables are kept.
      tx: as for `make_population_step`.
      members: of the population.

    Returns:
      A `TrainState` whose arrays, but for `step`, have a leading axis of members; and the frozen state, which has none.

    Raises:
      ValueError: other than one model a member; models that differ in the shape of what is trained or in the base; or a
        model on a mesh.
    """
    frozen, starts, whole = nnx.State({}), [], None
    for number, model in enumerate(models):
        _, trainable, base, host = nnx.split(model, nnx.Param, FrozenParam, ...)
        if number == 0:
            _require_one_device((trainable, base))
            frozen, whole = base, (trainable, host)
        _require_same_base(number, frozen, base)
        starts.append(_leaves(trainable) | _leaves(host))
        _require_same_shapes(number, starts[0], starts[-1])
    if whole is None or len(starts) != len(members.key):
        raise ValueError(f"{len(starts)} models for {len(members.key)} members; give one adapted model a member")
    stacked = [jnp.stack(values) for values in zip(*(start.values() for start in starts), strict=True)]
    trainable, host = jax.tree.unflatten(jax.tree.structure(whole), stacked)
    opt_state = jax.vmap(lambda one, member: _optimizer(tx, member).init(one))(trainable, members)
    return TrainState(jnp.zeros((), jnp.int32), trainable, opt_state, host), frozen


def make_population_step(
    model: nnx.Module,
    tx: Optimizer,
    loss: Loss,
    *,
    streams: Streams = "shared",
    accumulate: int = 1,
    at_once: int | None = None,
) -> jax.stages.Wrapped:
    """The jitted step of a whole population, `(state, frozen, batch, members) -> (state, metrics)`. It donates `state`.

    Each member makes the step that `make_train_step` would make of it alone, to rounding; its dropout masks are the
    same bit for bit.

    Args:
      model: gives the structure (see `make_train_step`); its alpha and dropout hold where `members` names none.
      tx: the optimizer of all, or a function that makes a member's from its part of `members.optim` (scalars, traced).
      loss: as for `make_train_step`.
      streams: "shared", all members see the same batch; or "own", the batch's arrays have a leading axis of members.
      accumulate: as for `make_train_step`, of each member's batch.
      at_once: members whose activations are in memory at a time, one group of them after another in the same step; None
        is all.

    Raises:
      ValueError: an unknown `streams`; `at_once` below 1; `accumulate` as for `make_train_step`; a model on a mesh, or
        one that was adapted with strategy "merged".

    Returns:
      The step. Metrics are those of `make_train_step`, [m] arrays.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> def loss(model, x):
    ...     return (model(x) ** 2).mean()
    >>> models = [MELoRADense(4, 6, n=2, rngs=nnx.Rngs(params=0)) for _ in range(3)]
    >>> members = make_members(jax.random.split(jax.random.key(0), 3), optim=[1e-3, 2e-3, 4e-3])
    >>> state, frozen = population_state(models, optax.adamw, members)
    >>> state, metrics = make_population_step(models[0], optax.adamw, loss)(state, frozen, jnp.ones((5, 4)), members)
    >>> metrics["loss"].shape
    (3,)
    """
    check_count("accumulate", accumulate)
    check_count("at_once", 1 if at_once is None else at_once)
    if streams not in ("shared", "own"):
        raise ValueError(f"streams={streams!r} is unknown; choose shared or own")
    graphdef, *state = nnx.split(model, nnx.Param, FrozenParam, ...)
    _require_one_device(state)
    for layer in _merged_layers(model):
        if layer.spec.strategy == "merged":
            raise ValueError(
                f'strategy="merged" at {layer.path} would form W + ΔW for each member; adapt with strategy="auto"'
            )

    def one(state: TrainState, frozen: nnx.State, batch: Batch, member: Members) -> tuple[tuple[Any, ...], Metrics]:
        def own_loss(current: nnx.Module, batch: Batch) -> Any:
            with _as(member, current):
                return loss(current, batch)

        step = step_of(graphdef, _optimizer(tx, member), own_loss, accumulate, None)
        after, metrics = step(state, frozen, batch, member.key)
        return tuple(after)[1:], metrics

    every = _over_members(one, streams, at_once)

    def step(state: TrainState, frozen: nnx.State, batch: Batch, members: Members) -> tuple[TrainState, Metrics]:
        arrays, metrics = every(state, frozen, batch, members)
        return TrainState(state.step + 1, *arrays), metrics

    return jax.jit(step, donate_argnums=0)


def make_population_eval(
    model: nnx.Module, evaluate: Callable[[Any, Batch], Any], *, at_once: int | None = None
) -> jax.stages.Wrapped:
    """The jitted `(state, frozen, batch, members) -> evaluate(model, batch)` of each member, leaves [m, ...].

    Args:
      model: gives the structure.
      evaluate: any function of a model and a batch, which all members see; traced without dropout.
      at_once: as for `make_population_step`.
    """
    graphdef = nnx.split(model, nnx.Param, FrozenParam, ...)[0]

    def one(state: TrainState, frozen: nnx.State, batch: Batch, member: Members) -> Any:
        current = nnx.merge(graphdef, state.trainable, frozen, state.host, copy=True)
        current.eval()
        with _as(member, current):
            return evaluate(current, batch)

    return jax.jit(_over_members(one, "shared", at_once))


def member_state(state: TrainState, number: int) -> TrainState:
    """The state of one member's lone run, copied out of the population's.

    Its factors go with that member's own alpha: put them into a model that was adapted with it.
    """
    return TrainState(jnp.copy(state.step), *jax.tree.map(lambda x: x[number], tuple(state)[1:]))


def _over_members(one: Callable[..., Any], streams: Streams, at_once: int | None) -> Callable[..., Any]:
    """`one(state, frozen, batch, member)` of every member, vmapped, or scanned over groups that are vmapped."""

    def every(state: TrainState, frozen: nnx.State, batch: Batch, members: Members) -> Any:
        def call(own: tuple[Any, Batch, Members]) -> Any:
            arrays, rows, member = own
            return one(TrainState(state.step, *arrays), frozen, batch if streams == "shared" else rows, member)

        mapped = (tuple(state)[1:], batch if streams == "own" else None, members)
        if at_once is None or at_once >= len(members.key):
            return jax.vmap(call)(mapped)
        return jax.lax.map(call, mapped, batch_size=at_once)

    return every


@contextlib.contextmanager
def _as(member: Members, model: nnx.Module) -> Iterator[None]:
    """Inside, `model` has the member's alpha, for good, and the member's rate of dropout."""
    for layer in _merged_layers(model):
        # W + ΔW would be one a member, and its product can't drop; beside the base's own product all members share W.
        latents = layer.product.spec.n * max(layer.product.spec.r)
        layer.strategy = unmerged(layer.strategy, latents, platform())
    if member.alpha is not None:
        for path, variable in nnx.to_flat_state(nnx.state(model, MELoRAParam)):
            if path[-1] == "b":
                variable.set_value(variable[...] * member.alpha)
    with adapter_dropout(member.dropout):
        yield


def _optimizer(tx: Optimizer, member: Members) -> optax.GradientTransformation:
    return tx(member.optim) if callable(tx) else tx


def _merged_layers(model: nnx.Module) -> list[MELoRADense]:
    return [node for _, node in walk(model) if isinstance(node, MELoRADense) and node.strategy == "merged"]


def _require_one_device(tree: Any) -> None:
    if mesh_of_tree(tree) is not None:
        raise ValueError("a population runs on one device, and this model lies on a mesh; load it without mesh=")


def _require_same_base(number: int, ours: nnx.State, theirs: nnx.State) -> None:
    one, other = _leaves(ours), _leaves(theirs)
    _require_same_shapes(number, one, other)
    for path, value in one.items():
        if value is not other[path] and not bool((value == other[path]).all()):
            raise ValueError(
                f"the base of model {number} differs from that of model 0 at {path}; members share one base"
            )


def _require_same_shapes(number: int, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    one, other = ({path: (x.shape, x.dtype) for path, x in leaves.items()} for leaves in (ours, theirs))
    differing = [path for path in {**one, **other} if one.get(path) != other.get(path)]
    if differing:
        raise ValueError(
            f"model {number} differs from model 0 in the shape or presence of {differing[0]}; members may differ in "
            "start, alpha and dropout, but not in n, r, targets or modules_to_save"
        )


def _leaves(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _named(optim: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(optim, is_leaf=_is_values)
    return [(path_of(path) or "optim", values) for path, values in leaves]


def _is_values(node: Any) -> bool:
    return isinstance(node, (list, tuple)) and all(isinstance(value, (int, float)) for value in node)


def _floats(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.float32)
