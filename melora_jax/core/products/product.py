"""x·W + x·ΔW: the one product that every adapted layer computes, by the strategy of its plan."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from melora_jax.core.products.latents import update
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
      keep: which entries of the input the adapter's dropout keeps (`ProductPlan.mask`); None keeps all.
      bias: of the layer.

    Source: MELoRA (arXiv 2402.17263), equation 3.

    >>> import jax.numpy as jnp
    >>> from melora_jax.config import AdapterSpec
    >>> from melora_jax.core.dense_view import DenseView
    >>> from melora_jax.core.products.plan import plan_product
    >>> plan = plan_product(AdapterSpec(n=2, r=(1, 1), alpha=(1.0, 2.0)), DenseView(2, 2, out_shape=(2,)))
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

    >>> import jax.numpy as jnp
    >>> dense_product(jnp.array([3.0, 5.0]), jnp.ones((2, 1))).tolist()
    [8.0]
    """
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, axes, precision=precision, preferred_element_type=output_dtype)
