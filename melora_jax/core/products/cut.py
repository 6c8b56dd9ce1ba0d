"""How a mesh cuts a product: what one device holds of the kernel and the minis, inside a `shard_map`."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

Form = Literal["column", "row", "whole"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """What one device holds of a dense layer and its adapter.

    Attributes:
      form: "column": the kernel's part for some outputs, and the whole input; "row": the part for some inputs, which
        are all that it has, and partial sums of the output; "whole": all of it.
      minis: whether it holds the minis of its own part alone; otherwise it holds all of them.
      over: the mesh axis that cuts.
      parts: its size.
    """

    form: Form
    minis: bool
    over: str
    parts: int

    def read(self, x: jax.Array) -> jax.Array:
        """What the device's minis read of its input."""
        if self.form == "column" and self.minis:
            return own_part(x, self.over)
        return at_own_part(x, self.over) if self.form == "row" and not self.minis else x

    def written(self, update: jax.Array) -> jax.Array:
        """What the device's minis write, in the place where its output has it."""
        if self.form == "row" and self.minis:
            return at_own_part(update, self.over)
        return own_part(update, self.over) if self.form == "column" and not self.minis else update

    def gradient(self, cotangent: jax.Array) -> jax.Array:
        """The gradient of what the device's own minis write, from that of its output."""
        return own_part(cotangent, self.over) if self.form == "row" else cotangent

    def in_place(self, delta: jax.Array) -> jax.Array:
        """ΔW of the device's own minis, as wide and high as its kernel."""
        if self.form == "row":
            return at_own_part(delta, self.over)
        return at_own_part(delta.T, self.over).T if self.form == "column" else delta

    def scale(self, scale: jax.Array) -> jax.Array:
        """The scale `[n r]` of the device's minis."""
        return own_part(scale.T, self.over).T if self.minis else scale


def own_part(x: jax.Array, over: str) -> jax.Array:
    """The device's part of the last axis of an array that every device holds whole."""
    size = x.shape[-1] // jax.lax.axis_size(over)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(over) * size, size, axis=-1)


def at_own_part(x: jax.Array, over: str) -> jax.Array:
    """The inverse: zeros as wide as the parts of all devices together, with `x` in the place of the device's part."""
    size, parts = x.shape[-1], jax.lax.axis_size(over)
    wide = jnp.zeros((*x.shape[:-1], size * parts), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(wide, x, jax.lax.axis_index(over) * size, axis=-1)
