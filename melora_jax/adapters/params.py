"""The variable types that say what is trained, and the way from one to another."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class MELoRAParam(nnx.Param):
    """A mini-adapter factor: an `nnx.Param`, so the usual `wrt=nnx.Param` trains it."""


class FrozenParam(nnx.Variable):
    """A base parameter that is not trained: no `nnx.Param`, so `wrt=nnx.Param` passes it by."""


class StartParam(FrozenParam):
    """Start values of a factor, which its adapter is the difference from: not trained, but saved with it."""


class BaseParam(nnx.Param):
    """A base parameter that is trained: a bias, or in full fine-tuning any. `merge` and `unwrap` give its type back."""


def freeze(variable: nnx.Variable) -> nnx.Variable:
    """The same value and metadata as a `FrozenParam`, which remembers the type it had."""
    metadata = variable.get_metadata() | {"thawed": type(variable)}
    return FrozenParam.from_metadata(variable.get_raw_value(), metadata)


def trained(variable: nnx.Variable) -> nnx.Variable:
    """The same value as a `BaseParam` in float32, which remembers the type and dtype it had."""
    value = variable.get_raw_value()
    metadata = variable.get_metadata() | {"thawed": type(variable), "thawed_dtype": value.dtype}
    return BaseParam.from_metadata(in_float32(value), metadata)


def thaw(variable: FrozenParam | BaseParam) -> nnx.Variable:
    """The inverse of `freeze`, and of `trained`, whose value is rounded to the dtype it had."""
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
