"""The variable types that say what is trained, and how a variable changes from one to another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class MELoRAParam(nnx.Param):
    """A factor of an adapter, float32: a `[n i r]`, b `[n r o]`, or what its kind has beside them.

    It is an `nnx.Param`, so the usual `wrt=nnx.Param` trains it.

    >>> from melora_jax.adapters import MELoRADense
    >>> layer = MELoRADense(8, 12, n=4, rngs=nnx.Rngs(0))
    >>> {name: factor.shape for name, factor in nnx.state(layer, MELoRAParam).items()}
    {'a': (4, 2, 1), 'b': (4, 1, 3)}
    """


class FrozenParam(nnx.Variable):
    """A parameter of the base that is not trained, in its own shape and dtype.

    It is not an `nnx.Param`, so `wrt=nnx.Param` leaves it out: no gradient and no optimizer state is made for it.
    `merge` and `unwrap` give its type back.

    >>> from melora_jax.adapters import MELoRADense
    >>> layer = MELoRADense(8, 12, n=4, rngs=nnx.Rngs(0))
    >>> list(nnx.state(layer, nnx.Param)), list(nnx.state(layer, FrozenParam)["base"])
    (['a', 'b'], ['bias', 'kernel'])
    """


class StartParam(FrozenParam):
    """Start values of a factor, which PiSSA's update is the difference from: not trained, but saved with it."""


class BaseParam(nnx.Param):
    """A parameter of the base that is trained, in float32: a bias, or in full fine-tuning any.

    `merge` and `unwrap` restore its type and dtype.

    >>> from melora_jax.adapters import adapt
    >>> from melora_jax.config import MELoRAConfig
    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> _ = adapt(model, MELoRAConfig(targets=(), bias="all"), rngs=nnx.Rngs(0))
    >>> type(model.layers[0].bias).__name__, type(model.layers[0].kernel).__name__
    ('BaseParam', 'FrozenParam')
    """


def freeze(variable: nnx.Variable) -> nnx.Variable:
    """The same value and metadata as a `FrozenParam`, which remembers its type."""
    metadata = variable.get_metadata() | {"thawed": type(variable)}
    return FrozenParam.from_metadata(variable.get_raw_value(), metadata)


def trained(variable: nnx.Variable) -> nnx.Variable:
    """The same value as a `BaseParam` in float32, which remembers its type and dtype."""
    value = variable.get_raw_value()
    metadata = variable.get_metadata() | {"thawed": type(variable), "thawed_dtype": value.dtype}
    return BaseParam.from_metadata(in_float32(value), metadata)


def thaw(variable: FrozenParam | BaseParam) -> nnx.Variable:
    """The inverse of `freeze`, and of `trained`, whose value is rounded to its original dtype."""
    value, metadata = variable.get_raw_value(), variable.get_metadata()
    kind, dtype = metadata.pop("thawed"), metadata.pop("thawed_dtype", value.dtype)
    return kind.from_metadata(value if dtype == value.dtype else value.astype(dtype), metadata)


def in_float32(value: Any) -> Any:
    """Narrower floats in float32: updates of a small learning rate vanish in bfloat16."""
    if not jnp.issubdtype(value.dtype, jnp.floating) or value.dtype == jnp.float32:
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, jnp.float32, sharding=value.sharding)
    return value.astype(jnp.float32)
