"""One device's part of an array, inside a `shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def own_part(x: jax.Array, over: str) -> jax.Array:
    """This device's part of the last axis of an array that every device holds whole.

    Args:
      x: the array.
      over: the mesh axis that cuts it.
    """
    size = x.shape[-1] // jax.lax.axis_size(over)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(over) * size, size, axis=-1)


def at_own_part(x: jax.Array, over: str) -> jax.Array:
    """The inverse: zeros as wide as the parts of all devices together, with `x` in the place of this device's part."""
    size, parts = x.shape[-1], jax.lax.axis_size(over)
    before = jax.lax.axis_index(over) * size
    wide = jnp.zeros((*x.shape[:-1], size * parts), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(wide, x, before, axis=-1)
