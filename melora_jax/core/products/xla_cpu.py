"""What XLA on CPU, and it alone, computes faster or in less memory in another form."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

from melora_jax.core.blocks import block_diagonal


def products_of_blocks(x: Float[Array, "t d_in"], cotangent: Float[Array, "t d_out"], n: int) -> Float[Array, "n i o"]:
    """x_kᵀg_k of each of n slices of the columns of both, one after another.

    For an axis of blocks, XLA on CPU copies both transposed; a slice of columns it reads where it is. The narrower of
    the two stands on the left, because packing the left operand costs more.

    >>> products_of_blocks(jnp.array([[3.0, 5.0]]), jnp.array([[7.0, 11.0]]), 2).tolist()
    [[[21.0]], [[55.0]]]
    """
    if x.shape[1] > cotangent.shape[1]:
        return products_of_blocks(cotangent, x, n).swapaxes(1, 2)

    def of_block(k: Array, _: None) -> tuple[Array, Array]:
        return k + 1, _columns(x, k, n).T @ _columns(cotangent, k, n)

    return jax.lax.scan(of_block, jnp.int32(0), length=n)[1]


def _columns(array: Array, k: Array, n: int) -> Array:
    """The k-th of n slices of the columns."""
    rows, width = array.shape[0], array.shape[1] // n
    return jax.lax.dynamic_slice(array, (0, k * width), (rows, width), allow_negative_indices=False)


def after(gradient: Float[Array, "n p q"], factor: Float[Array, "n p q"]) -> Float[Array, "n p q"]:
    """The factor plus a zero that is computed from its gradient, so that it is not used before.

    XLA on CPU ignores optimization barriers, and computes first what waits for nothing, for all layers at once.
    """
    flat = gradient.reshape(len(gradient), -1)  # XLA moves an axis of size one, and would copy it back for the sum
    return (factor.reshape(flat.shape) + (flat - flat)).reshape(factor.shape)


def _by_thin(x: Array, blocks: Array) -> Array:
    n, p, q = blocks.shape
    if p > 1:
        return x @ block_diagonal(blocks)
    # A number a block times its row, which XLA fuses with what it is added to.
    return (x[:, :, None] * blocks.reshape(n, q)).reshape(-1, n * q)


_thin_product = jax.custom_vjp(_by_thin)


def thin_product(x: Float[Array, "t np"], blocks: Float[Array, "n p q"]) -> Float[Array, "t nq"]:
    """x · block_diagonal(blocks) of blocks that are one row or one column each.

    The gradient of the blocks is a sum over rows, column by column. Derived by jax it would be xᵀg whole, n times the
    entries that are asked for.

    >>> thin_product(jnp.array([[3.0, 5.0]]), jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()
    [[3.0, 6.0, 15.0, 20.0]]
    """
    y: Any = _thin_product(x, blocks)
    return y


def _forward(x: Array, blocks: Array) -> tuple[Array, tuple[Array, Array]]:
    return _by_thin(x, blocks), (x, blocks)


def _backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, blocks = kept
    to_blocks = _column_sums(x, cotangent)
    return _by_thin(cotangent, blocks.swapaxes(1, 2)), to_blocks.reshape(blocks.shape).astype(blocks.dtype)


_thin_product.defvjp(_forward, _backward)


@jax.custom_jvp
def _column_sums(x: Array, cotangent: Array) -> Array:
    # In a call that XLA does not look into: it would see rows of two axes, batch and length, here, and of one in the
    # other product, and compute what made the cotangent once for each.
    if jax.device_count() > 1:
        return _sums(x, cotangent)
    with set_xla_metadata(inlineable="false"):
        return _called_sums(x, cotangent)


@_column_sums.defjvp
def _derivative(given: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Any]:
    return _column_sums(*given), jax.jvp(_sums, given, tangents)[1]


def _sums(x: Array, cotangent: Array) -> Array:
    """Σ_t x_k·g_k of n slices of both, where those of the narrower are single columns, broadcast over the other's."""
    n = min(x.shape[1], cotangent.shape[1])
    rows, columns = (array.astype(jnp.float32).reshape(len(array), n, -1) for array in (x, cotangent))
    return (rows * columns).sum(0)  # in three axes: in four, XLA on CPU makes the whole step much slower


_called_sums = jax.jit(_sums)
