"""Populations: many runs of one model in one jitted step, their adapters and heads vmapped over one frozen base.

Members may differ in their initial values, dropout key, optimizer settings (learning rates, weight decay), alpha and
adapter dropout rate. A product with a frozen kernel is one product over the rows of all members, and the adapters'
products are batched::

    members = make_members(keys, optim={"rate": rates}, alpha=factors, dropout=rates)
    state, frozen = population_state(models, make_tx, members)
    step = make_population_step(model, make_tx, loss)
    state, metrics = step(state, frozen, batch, members)          # metrics [m]
    lone = member_state(state, 3)                                 # as if member 3 had run alone

Everything that determines shapes or code (n, r, mixer, targets, the kind of optimizer) is the same for all members.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import FrozenParam
from melora_jax.core.dropout import adapter_dropout, rounded_rate
from melora_jax.nn.sharding import mesh_of_tree
from melora_jax.nn.tree import path_of, walk
from melora_jax.training.step import Batch, Loss, Metrics, TrainState, step_of
from melora_jax.validation import check_alpha, check_count, check_number

Streams = Literal["shared", "own"]
Optimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]


class Members(NamedTuple):
    """What the members of a population differ in. Use `make_members` to create it.

    Attributes:
      key: each member's PRNG key, `[m]`, as `make_train_step` takes one.
      optim: each member's optimizer settings, a tree of float32 `[m]` arrays; None if all share one optimizer.
      alpha: each member's alpha divided by the model's, float32 `[m]`; None if all have the model's alpha.
      dropout: each member's rate of adapter dropout, float32 `[m]`; None if all have the model's rate.

    >>> Members(jax.random.split(jax.random.key(0), 3)).key.shape
    (3,)
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
      keys: one PRNG key per member.
      optim: a tree of sequences with one number per member, such as `{"rate": [1e-3, 2e-3]}`.
      alpha: each member's alpha divided by the alpha that the model was adapted with, above 0. B is multiplied by it
        when the model runs, which is exact for powers of two and rounds otherwise.
      dropout: each member's rate, at least 0 and below 1, rounded to a multiple of 1/65536.

    Raises:
      ValueError: there are no members, a sequence does not have one value per member, or a value is out of range.

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
        check_alpha("alpha", float(factor))
    for rate in dropout or ():
        check_number("dropout", float(rate), low=0.0, below=1.0)
    return Members(
        key=jnp.stack(keys),
        optim=jax.tree.map(_floats, optim, is_leaf=_is_values),
        alpha=None if alpha is None else _floats(alpha),
        dropout=None if dropout is None else _floats([rounded_rate(rate) for rate in dropout]),
    )


def population_state(models: Iterable[nnx.Module], tx: Optimizer, members: Members) -> tuple[TrainState, nnx.State]:
    """The initial state of a population and its frozen base.

    Args:
      models: one adapted model per member, in order, with that member's initial adapters and head. The first model's
        base serves all. Of the other models only the trained part is kept, so an iterator need not hold them all.
      tx: as for `make_population_step`.
      members: the members.

    Returns:
      `(state, frozen)`: a `TrainState` whose arrays have a leading axis of members, except for `step`; and the frozen
      state, which has none.

    Raises:
      ValueError: the number of models is not the number of members, the models' trained shapes or bases differ, or a
        model lies on a mesh.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> models = [MELoRADense(4, 6, n=2, rngs=nnx.Rngs(params=0)) for _ in range(3)]
    >>> members = make_members(jax.random.split(jax.random.key(0), 3))
    >>> state, frozen = population_state(models, optax.sgd(0.1), members)
    >>> state.trainable["a"].shape, frozen["base"]["kernel"].shape
    ((3, 2, 2, 1), (4, 6))
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

    Each member takes the step that `make_train_step` would take of it alone, up to rounding, with bit-identical dropout
    masks.

    Args:
      model: gives the structure (see `make_train_step`), and alpha and dropout unless `members` sets them.
      tx: one optimizer for all, or a function that makes a member's optimizer from its part of `members.optim` (traced
        scalars).
      loss: as for `make_train_step`.
      streams: "shared": all members see the same batch; "own": the batch's arrays have a leading axis of members.
      accumulate: as for `make_train_step`, for each member's batch.
      at_once: the number of members whose activations are in memory at a time; groups of them run one after another
        within the step. None runs all at once.

    Returns:
      The step. Its metrics are those of `make_train_step`, as float32 `[m]` arrays.

    Raises:
      ValueError: `streams` is unknown, `at_once` is below 1, `accumulate` as for `make_train_step`, the model lies on a
        mesh, or it was adapted with strategy "merged".

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
    """The jitted evaluation `(state, frozen, batch, members) -> evaluate(model, batch)`, with leaves `[m, ...]`.

    Args:
      model: gives the structure.
      evaluate: any function of a model and a batch that returns arrays; it is traced without dropout. All members see
        the same batch.
      at_once: as for `make_population_step`.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> models = [MELoRADense(4, 6, n=2, rngs=nnx.Rngs(params=0)) for _ in range(3)]
    >>> members = make_members(jax.random.split(jax.random.key(0), 3))
    >>> state, frozen = population_state(models, optax.sgd(0.1), members)
    >>> evaluate = make_population_eval(models[0], lambda model, x: model(x))
    >>> evaluate(state, frozen, jnp.ones((5, 4)), members).shape
    (3, 5, 6)
    """
    graphdef = nnx.split(model, nnx.Param, FrozenParam, ...)[0]

    def one(state: TrainState, frozen: nnx.State, batch: Batch, member: Members) -> Any:
        current = nnx.merge(graphdef, state.trainable, frozen, state.host, copy=True)
        current.eval()
        with _as(member, current):
            return evaluate(current, batch)

    return jax.jit(_over_members(one, "shared", at_once))


def member_state(state: TrainState, number: int) -> TrainState:
    """A copy of one member's state, as its run alone would have it.

    The factors belong to that member's alpha: put them into a model that was adapted with that alpha.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> models = [MELoRADense(4, 6, n=2, rngs=nnx.Rngs(params=0)) for _ in range(3)]
    >>> members = make_members(jax.random.split(jax.random.key(0), 3))
    >>> state, _ = population_state(models, optax.sgd(0.1), members)
    >>> member_state(state, 2).trainable["a"].shape
    (2, 2, 1)
    """
    return TrainState(jnp.copy(state.step), *jax.tree.map(lambda x: x[number], tuple(state)[1:]))


def _over_members(one: Callable[..., Any], streams: Streams, at_once: int | None) -> Callable[..., Any]:
    """`one(state, frozen, batch, member)` vmapped over all members, or over groups of them one after another."""

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
    """Gives `model` the member's alpha, permanently, and inside the block the member's dropout rate."""
    for layer in _merged_layers(model):
        # Merged products would need W + ΔW for each member, and admit no dropout; otherwise all members share x·W.
        layer.merges = False
    if member.alpha is not None:
        for layer in {id(node): node for _, node in walk(model) if isinstance(node, MELoRADense)}.values():
            layer.multiply_alpha(member.alpha)
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
