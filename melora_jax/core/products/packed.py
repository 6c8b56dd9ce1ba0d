"""The strategy `packed`: the products of all minis as one product with a matrix that is mostly zeros."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

from melora_jax.core.blocks import block_diagonal
from melora_jax.core.platform import platform
from melora_jax.core.products import xla_cpu


def packed_product(x: Float[Array, "t np"], blocks: Float[Array, "n p q"]) -> Float[Array, "t nq"]:
    """x · block_diagonal(blocks).

    Args:
      x: rows, of the blocks' dtype.
      blocks: the blocks. Where each is one row or one column, the product has no forward-mode derivative (`jax.jvp`)
        on CPU, though its gradient has.

    >>> import jax.numpy as jnp
    >>> packed_product(jnp.array([[3.0, 5.0]]), jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()
    [[3.0, 6.0, 15.0, 20.0]]
    """
    n, p, q = blocks.shape
    # On a mesh not: eight simulated devices were seen to wait for each other's sums without end.
    if n > 1 and min(p, q) == 1 and platform() == "cpu" and not _varies_by_device(x, blocks):
        return xla_cpu.thin_product(x, blocks)
    return x @ block_diagonal(blocks)


def _varies_by_device(*arrays: Array) -> bool:
    """Whether one of them differs from device to device, inside a `shard_map`."""
    return any(jax.typeof(array).mat.varying for array in arrays)
