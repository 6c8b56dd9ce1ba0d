"""x·W + x·ΔW: the one product that every adapted layer computes, by the strategy of its plan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from melora_jax.core.blocks import scale_of
from melora_jax.core.dropout import adapter_rate, drop, keep_mask
from melora_jax.core.products.latents import apply, expand, look_up, reduce
from melora_jax.core.products.merged import merged_product
from melora_jax.core.products.plan import ProductPlan


def adapted_product(
    plan: ProductPlan,
    x: Float[Array, "... d_in"],
    kernel: Float[Array, "d_in d_out"],
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
    keep: Bool[Array, "... d_in"] | None = None,
    bias: Float[Array, " d_out"] | None = None,
) -> Float[Array, "... d_out"]:
    """x·W + bias + concat_k( s_k · drop(x_k)·A_k·B_k ); inside a `shard_map`, one device's part of it.

    Args:
      plan: of the product.
      x: the input.
      kernel: W, of the dtype of the computation.
      a, b: the factors.
      keep: which entries of the input the adapter's dropout keeps (`adapter_mask`); None keeps all.
      bias: of the layer.

    Source: MELoRA (arXiv 2402.17263), equation 3.

    >>> from melora_jax.config import AdapterSpec
    >>> from melora_jax.core.dense_view import DenseView
    >>> from melora_jax.core.products.plan import plan_product
    >>> plan = plan_product(AdapterSpec(n=2, r=(1, 1), alpha=(1.0, 2.0)), DenseView(2, 2))
    >>> one = jnp.ones((2, 1, 1))
    >>> adapted_product(plan, jnp.array([3.0, 5.0]), jnp.ones((2, 2)), one, one).tolist()
    [11.0, 18.0]
    """
    if plan.strategy == "merged":
        y = merged_product(plan, x.astype(kernel.dtype), kernel, a, b)
        y = y if plan.output_dtype is None else y.astype(plan.output_dtype)
        return y if bias is None else y + bias.astype(y.dtype)
    y = dense_product(x.astype(kernel.dtype), kernel, plan.precision, plan.output_dtype)
    y = y if bias is None else y + bias
    return y + update(plan, x, a, b, keep, y.dtype)


def dense_product(
    x: Float[Array, "... d_in"], kernel: Float[Array, "d_in d_out"], precision: Any = None, output_dtype: Any = None
) -> Float[Array, "... d_out"]:
    """x·W.

    >>> dense_product(jnp.array([3.0, 5.0]), jnp.ones((2, 1))).tolist()
    [8.0]
    """
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, precision=precision, preferred_element_type=output_dtype)


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
    z = _latents(plan, x, a, keep)
    scale, cut = scale_of(plan.spec), plan.cut
    if cut is None:
        flat = expand(z, b, scale, plan.spec.mixer, plan.strategy)
        return plan.view.unflatten_output(flat).astype(dtype)
    return cut.written(expand(z, b, cut.scale(jnp.asarray(scale)), plan.spec.mixer, plan.strategy)).astype(dtype)


def _latents(plan: ProductPlan, x: Array, a: Array, keep: Array | None) -> Array:
    """drop(x_k)·A_k of every mini."""
    rate, mixer = adapter_rate(plan.spec.dropout), plan.spec.mixer
    if plan.view.lookup:  # an embedding's dropout drops whole tokens
        kept = jnp.ones(x.shape, a.dtype)
        return look_up(x, a, kept if keep is None else drop(kept, keep, rate), mixer)
    flat = plan.view.flatten_input(x) if plan.cut is None else plan.cut.read(x)  # only dense layers are cut
    flat = flat.astype(a.dtype)
    return reduce(flat if keep is None else drop(flat, keep, rate), a, plan.strategy, mixer)


def adapter_mask(plan: ProductPlan, shape: tuple[int, ...], path: str) -> Bool[Array, ...] | None:
    """Which entries the adapter's dropout at `path` keeps of an input of a layer; None where it drops nothing.

    Args:
      plan: of the product.
      shape: of the layer's input.
      path: names the stream of random numbers.
    """
    return keep_mask(plan.view.flat_shape(shape), adapter_rate(plan.spec.dropout), path)


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
