"""x·ΔW without forming ΔW: from the input to n·r latents, and from these to the output."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from melora_jax.config import Mixer, Strategy
from melora_jax.core.blocks import feature_order, mix, scale_of
from melora_jax.core.dropout import adapter_rate, drop
from melora_jax.core.products.batched import batched_product
from melora_jax.core.products.packed import packed_product
from melora_jax.core.products.plan import ProductPlan

_PRODUCTS = {"batched": batched_product, "packed": packed_product}


def update(
    plan: ProductPlan,
    x: Array,
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
    keep: Bool[Array, ...] | None,
    dtype: Any,
) -> Array:
    """x·ΔW alone, to be added to the output of a layer that computes x·W itself.

    Args:
      plan: of the product; its strategy is "batched" or "packed".
      x: the layer's input, in the layer's layout; of an embedding, its indices.
      a, b: the factors.
      keep: which entries of the flat input, or which indices, dropout keeps; None keeps all.
      dtype: of the output, and of the computation unless the adapter says another.

    Returns:
      An array in the layout of the layer's output.
    """
    a, b = (factor.astype(plan.spec.dtype or dtype) for factor in (a, b))
    scale, cut = scale_of(plan.spec), plan.cut
    scale = scale if cut is None else cut.scale(jnp.asarray(scale))
    y = expand(_latents(plan, x, a, keep), b, scale, plan.spec.mixer, plan.strategy)
    return (plan.view.unflatten_output(y) if cut is None else cut.written(y)).astype(dtype)


def _latents(plan: ProductPlan, x: Array, a: Array, keep: Array | None) -> Array:
    """drop(x_k)·A_k of every mini."""
    rate, mixer = adapter_rate(plan.spec.dropout), plan.spec.mixer
    if plan.view.lookup:  # an embedding's dropout drops whole tokens
        kept = jnp.ones(x.shape, a.dtype)
        return look_up(x, a, kept if keep is None else drop(kept, keep, rate), mixer)
    flat = plan.view.flatten_input(x) if plan.cut is None else plan.cut.read(x)  # only dense layers are cut
    flat = flat.astype(a.dtype)
    return reduce(flat if keep is None else drop(flat, keep, rate), a, plan.strategy, mixer)


def attend_update(
    plan: ProductPlan, query: Array, a: Float[Array, "n i r"], b: Float[Array, "n r o"], dtype: Any
) -> Array:
    """query·ΔEᵀ, of `dtype`: an adapted embedding `[..., features]` as output layer.

    The adapter's dropout is of the embedding's own input, so there is none here.
    """
    a, b = (factor.astype(plan.spec.dtype or dtype) for factor in (a, b))
    row = jax.ShapeDtypeStruct((*query.shape[:-1], plan.view.d_in), a.dtype)

    def forward(x: Array) -> Array:
        return apply(x, a, b, scale_of(plan.spec), plan.spec.mixer)

    (transposed,) = jax.linear_transpose(forward, row)(query.astype(a.dtype))
    return transposed.astype(dtype)


def apply(
    x: Float[Array, "... d_in"],
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
    scale: Float[Array, "n r"] | Float[np.ndarray, "n r"],
    mixer: Mixer = "identity",
    strategy: Strategy = "batched",
) -> Float[Array, "... d_out"]:
    """The adapter's output x·ΔW.

    Args:
      x: the input, of the factors' dtype.
      a, b: the factors.
      scale: s_k of each latent.
      mixer: of the latents.
      strategy: "batched" or "packed".

    >>> one = jnp.ones((2, 1, 1))
    >>> apply(jnp.array([3.0, 5.0]), one, one, np.array([[1.0], [2.0]], np.float32)).tolist()
    [3.0, 10.0]
    """
    return expand(reduce(x, a, strategy, mixer), b, scale, mixer, strategy)


def reduce(
    x: Float[Array, "... d_in"], a: Float[Array, "n i r"], strategy: Strategy, mixer: Mixer = "identity"
) -> Float[Array, "... n r"]:
    """The latents of every mini, x_k·A_k."""
    n, i, r = a.shape
    if mixer == "scatter":
        x = x[..., feature_order(n * i, 0)]
    # One axis of rows: with several, XLA on CPU transposes x for the gradient of A, and computes again, in that order,
    # what x was made from.
    return _PRODUCTS[strategy](x.reshape(-1, n * i), a).reshape(*x.shape[:-1], n, r)


def look_up(
    ids: Int[Array, "*batch"], a: Float[Array, "n i r"], keep: Float[Array, "*batch"], mixer: Mixer = "identity"
) -> Float[Array, "*batch n r"]:
    """The latents of a one-hot input of width n·i that is given as indices (an embedding's), times `keep`."""
    n, i, r = a.shape
    ids = jnp.where(ids < 0, ids + n * i, ids)  # counted from the end, as the embedding itself takes them
    if mixer == "scatter":
        ids = jnp.take(jnp.asarray(np.argsort(feature_order(n * i, 0)), ids.dtype), ids)
    rows = jnp.take(a.reshape(n * i, r), ids, axis=0)
    hit = jax.nn.one_hot(ids // i, n, dtype=a.dtype) * keep[..., None]
    return hit[..., :, None] * rows[..., None, :]


def expand(
    z: Float[Array, "... n r"],
    b: Float[Array, "n r o"],
    scale: Float[Array, "n r"] | Float[np.ndarray, "n r"],
    mixer: Mixer,
    strategy: Strategy,
) -> Float[Array, "... d_out"]:
    """From latents to the output: concat_k( (M·s·z)_k·B_k )."""
    n, r, o = b.shape
    z = mix(z * jnp.asarray(scale, z.dtype), mixer)
    y = _PRODUCTS[strategy](z.reshape(-1, n * r), b).reshape(*z.shape[:-2], n * o)
    return y[..., np.argsort(feature_order(n * o, 1))] if mixer == "scatter" else y
