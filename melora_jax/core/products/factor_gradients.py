"""The gradients of A and B where W + ΔW is one product: ΔW's at its diagonal blocks, or by way of the latents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from melora_jax.config import Mixer
from melora_jax.core import blocks
from melora_jax.core.platform import platform
from melora_jax.core.products.block_diagonal import block_diagonal, column_sums, varies_by_device
from melora_jax.core.products.plan import choose_strategy, sums_columns

# s_k of each latent, [n r].
Scale = Array | np.ndarray
# Of so many rows as many neighbouring blocks are had in one product as make up so many of its entries. By themselves,
# 2,048 rows, n=32, on 2 CPU cores: 384 x 1,536 takes 2.3 ms for 3.4, 576 x 576 1.7 for 2.4, 768 x 768 2.2 for 3.8; but
# of 1,024 rows 384 x 384 takes 0.8 for 0.5.
JOINED_ROWS = 1536
JOINED_ENTRIES = 1200


def factor_gradients(
    x: Float[Array, "t d_in"],
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
    scale: Scale,
    cotangent: Float[Array, "t d_out"],
    mixer: Mixer,
) -> tuple[Float[Array, "n i r"], Float[Array, "n r o"]]:
    """The gradients of A and B, dA_k = (x_kᵀg_k)·s_k·B_kᵀ and dB_k = s_k·A_kᵀ·(x_kᵀg_k).

    Args:
      x: the input's rows, of the factors' dtype.
      a, b: the factors.
      scale: s_k of each latent, [n r].
      cotangent: g, the gradient of x·ΔW.
      mixer: of the latents.

    >>> one, rows = jnp.ones((1, 1, 1)), jnp.ones((2, 1))
    >>> [to.item() for to in factor_gradients(3 * rows, 5 * one, 7 * one, np.ones((1, 1)), rows, "identity")]
    [42.0, 30.0]
    """
    n, r = scale.shape
    to_left, to_right = scale[:, None, :], scale[:, :, None]
    if takes_blocks(a, b, mixer):
        products = _products_of_blocks(x, cotangent, n)
        to_a = jnp.einsum("nio,nro->nir", products, b * to_right)
        return to_a, jnp.einsum("nir,nio->nro", a * to_left, products)
    if mixer == "identity" and sums_columns(n, r, platform()) and not varies_by_device(x, cotangent, a, b):
        return _by_column_sums(x, a, b, scale, cotangent)
    strategy, ones = choose_strategy("auto", n * r, platform()), np.ones(scale.shape, np.float32)
    return jax.vjp(lambda a, b: blocks.apply(x, a * to_left, b, ones, mixer, strategy), a, b)[1](cotangent)


def _by_column_sums(x: Array, a: Array, b: Array, scale: Scale, cotangent: Array) -> tuple[Array, Array]:
    """Of minis of rank 1, dA_k = Σ_t x_k·s_k·(g_k·B_kᵀ) and dB_k = Σ_t s_k·(x_k·A_k)·g_k."""
    n = len(a)
    latents = x @ block_diagonal(a) * scale.reshape(n)
    to_latents = cotangent @ block_diagonal(b).T * scale.reshape(n)
    to_a, to_b = column_sums(x, to_latents), column_sums(latents, cotangent)
    return to_a.reshape(a.shape), to_b.reshape(b.shape)


def _products_of_blocks(x: Array, cotangent: Array, n: int) -> Array:
    """x_kᵀg_k of each block, `[n, i, o]`."""
    i, o = x.shape[1] // n, cotangent.shape[1] // n
    if platform() != "cpu":
        return jnp.einsum("tni,tno->nio", x.reshape(-1, n, i), cotangent.reshape(-1, n, o))
    # XLA on CPU would transpose both, for an axis of blocks; columns it takes as they lie. The narrower stands on the
    # left, which is dearer to pack (1536 by 384: 4.7 : 3.0 ms).
    return _by_columns(x, cotangent, n) if i <= o else _by_columns(cotangent, x, n).swapaxes(1, 2)


def _by_columns(left: Array, right: Array, n: int) -> Array:
    """left_kᵀ·right_k of each of n blocks, one after another, `[n, columns of left / n, columns of right / n]`."""
    together = _together(n, len(left), left.shape[1] * right.shape[1] // n**2)

    def of_block(k: Array, _: None) -> tuple[Array, Array]:
        product = _columns(left, k, n // together).T @ _columns(right, k, n // together)
        return k + 1, _diagonal_blocks(product, together)

    products = jax.lax.scan(of_block, jnp.int32(0), length=n // together)[1]
    return products.reshape(n, *products.shape[2:])


def _together(n: int, rows: int, entries: int) -> int:
    """How many neighbouring blocks are had in one product, of which those off its diagonal are thrown away.

    Args:
      n: blocks.
      rows: that are summed over.
      entries: of one block.
    """
    counts = (count for count in range(1, n) if n % count == 0 and count**2 * entries >= JOINED_ENTRIES)
    return next(counts, 1) if rows >= JOINED_ROWS else 1


def _diagonal_blocks(product: Array, count: int) -> Array:
    """The blocks along the diagonal of a product of so many."""
    rows, columns = product.shape[0] // count, product.shape[1] // count
    apart = [product[k * rows :, k * columns :][:rows, :columns] for k in range(count)]
    return jnp.concatenate(apart).reshape(count, rows, columns)


def _columns(array: Array, k: Array, n: int) -> Array:
    """The k-th of n slices of the columns."""
    rows, width = array.shape[0], array.shape[1] // n
    return jax.lax.dynamic_slice(array, (0, k * width), (rows, width), allow_negative_indices=False)


def takes_blocks(a: Array, b: Array, mixer: Mixer) -> bool:
    """Whether the blocks x_kᵀg_k, d_in·d_out / n multiplications a token, cost less than products with n·r latents.

    Those, n·r·(d_in + d_out) packed, count three times, being so narrow, and 0.3 times where r is 1, being half as many
    and one pass over x and g each (`block_diagonal_product`). Measured on two CPU cores by MiniLM's step, all linear
    layers adapted, over the frozen limit, blocks : latents: n=4 r=1 1.15 : 1.06, n=8 r=1 1.17 : 1.07, n=16 r=1 1.11 :
    1.07, n=32 r=1 1.14 : 1.15; n=2 r=8 1.33 : 1.17, n=4 r=8 1.19 : 1.24, n=8 r=8 1.16 : 1.82. With blocks joined n=32
    r=1 is 1.11 by blocks and 1.11 with latents where d_in is not d_out, in 667 MB for 682.
    """
    (n, i, r), o = a.shape, b.shape[2]
    weight = 0.3 if sums_columns(n, r, platform()) else 3
    return mixer == "identity" and i * o <= weight * n * r * (i + o)
