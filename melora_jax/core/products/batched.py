"""The strategy `batched`: the products of all minis as one product over an axis of blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def batched_product(x: Float[Array, "t np"], blocks: Float[Array, "n p q"]) -> Float[Array, "t nq"]:
    """x · block_diagonal(blocks), block by block.

    >>> batched_product(jnp.array([[3.0, 5.0]]), jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()
    [[3.0, 6.0, 15.0, 20.0]]
    """
    n, p, q = blocks.shape
    y = jax.vmap(jnp.matmul, in_axes=(1, 0), out_axes=1)(x.reshape(-1, n, p), blocks)
    return y.reshape(-1, n * q)
