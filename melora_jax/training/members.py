"""What the members of a population differ in, as arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from melora_jax.core.dropout import rounded_rate
from melora_jax.nn.tree import path_of


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


def _named(optim: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(optim, is_leaf=_is_values)
    return [(path_of(path) or "optim", values) for path, values in leaves]


def _is_values(node: Any) -> bool:
    return isinstance(node, (list, tuple)) and all(isinstance(value, (int, float)) for value in node)


def _floats(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.float32)
