"""The embedding table of our models, which may be cut over a mesh."""

from __future__ import annotations

import jax
from flax import nnx

from melora_jax.nn.parallel import look_up
from melora_jax.nn.sharding import active_mesh


class Table(nnx.Embed):
    """An `nnx.Embed` that looks up on each device the rows that it holds.

    Attributes:
      units: between how many rows `tensor` may cut the table; None where it may not.
    """

    units: int | None = None

    def __call__(self, inputs: jax.Array, out_sharding: jax.P | None = None) -> jax.Array:
        if active_mesh() is None:
            return super().__call__(inputs, out_sharding)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        return look_up(table, inputs, self.units)
