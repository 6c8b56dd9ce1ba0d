"""The strategy `merged`: one product with W + ΔW, formed once a pass, in place of two products and their sum.

Beside it stand the gradients of the factors: ΔW's gradient xᵀg at its diagonal blocks, or by way of the latents.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from melora_jax.config import AdapterSpec
from melora_jax.core.blocks import block_diagonal, delta, exact_product, packed_factors, scale_of
from melora_jax.core.dense_view import DenseView
from melora_jax.core.products import latents, xla_cpu
from melora_jax.core.products.plan import ProductPlan, choose_strategy


def merged_product(
    plan: ProductPlan,
    x: Float[Array, "... d_in"],
    kernel: Float[Array, "d_in d_out"],
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
) -> Float[Array, "... d_out"]:
    """x·(W + ΔW), summed and multiplied in float32 at least: in bfloat16 a small ΔW vanishes beside W.

    Args:
      plan: of the product.
      x: the input.
      kernel: W.
      a, b: the factors; where ranks differ, padded to the widest.

    Returns:
      An array of the dtype to which those of `x` and `kernel` promote.
    """
    y: Any = _product(plan, x, kernel, a, b)
    return y


def _by_sum(plan: ProductPlan, x: Array, kernel: Array, a: Array, b: Array) -> Array:
    y = _dot(x, _formed(plan, kernel, a, b), plan.precision)
    return y.astype(jnp.promote_types(x.dtype, kernel.dtype))


_product = jax.custom_vjp(_by_sum, nondiff_argnums=(0,))


def _forward(plan: ProductPlan, *given: Array) -> tuple[Array, tuple[Array, ...]]:
    return _by_sum(plan, *given), given


def _backward(plan: ProductPlan, given: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    kernel, a, b = given[1:]
    x, cotangent = (array.reshape(-1, array.shape[-1]) for array in (given[0], cotangent))
    to_a, to_b = _factor_gradients(plan, x, a, b, cotangent)
    # Form W + ΔW again when the gradient needs it, rather than keep that of every layer from the forward pass.
    again = _formed(plan, kernel, _after(plan, to_a, a), b)
    to_x = _dot(cotangent, again.T, plan.precision).reshape(given[0].shape)
    to_kernel = _dot(x.T, cotangent, plan.precision)  # XLA leaves it out where the kernel is frozen
    return tuple(to.astype(of.dtype) for to, of in zip((to_x, to_kernel, to_a, to_b), given, strict=True))


_product.defvjp(_forward, _backward)


def _formed(plan: ProductPlan, kernel: Array, a: Array, b: Array) -> Array:
    """W + ΔW."""
    scale = _scale(plan)
    if plan.spec.mixer != "identity":
        return kernel + exact_product(*packed_factors(a, b, scale, plan.spec.mixer))
    a = a * scale[:, None, :]
    if plan.cut is None or plan.cut.form == "whole":
        return add_block_diagonal(kernel, a, b)
    return kernel + plan.cut.in_place(block_diagonal(exact_product(a, b)))


def add_block_diagonal(
    matrix: Float[Array, "np nq"], left: Float[Array, "n p r"], right: Float[Array, "n r q"]
) -> Float[Array, "np nq"]:
    """matrix + block_diagonal(left @ right), the products exact to the dtype's rounding.

    >>> left, right = jnp.array([[[1.0]], [[2.0]]]), jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> add_block_diagonal(jnp.ones((2, 4)), left, right).tolist()
    [[2.0, 3.0, 1.0, 1.0], [1.0, 1.0, 7.0, 9.0]]
    """
    n, p, r = left.shape
    q = right.shape[2]
    if r == 1:  # in two axes, along which a processor's vectors run
        update = left.reshape(-1, 1) * right.reshape(1, -1)
    else:
        update = jnp.tile(exact_product(left, right).reshape(n * p, q), (1, n))
    row, column = (np.arange(n).repeat(size).astype(np.int32) for size in (p, q))
    return jnp.where(row[:, None] == column, matrix + update, matrix)


def _factor_gradients(plan: ProductPlan, x: Array, a: Array, b: Array, cotangent: Array) -> tuple[Array, Array]:
    """dA_k = (x_kᵀg_k)·s_k·B_kᵀ and dB_k = s_k·A_kᵀ·(x_kᵀg_k), in float32 at least."""
    if plan.cut is not None:
        x, cotangent = plan.cut.read(x), plan.cut.gradient(cotangent)
    x, a, b, cotangent = (_wide(array) for array in (x, a, b, cotangent))
    scale = _scale(plan)
    to_left, to_right = scale[:, None, :], scale[:, :, None]
    if plan.gradients == "blocks":
        products = _products_of_blocks(plan, x, cotangent)
        to_a = jnp.einsum("nio,nro->nir", products, b * to_right)
        return to_a, jnp.einsum("nir,nio->nro", a * to_left, products)
    n, r = scale.shape
    strategy, ones = choose_strategy("auto", n, r, plan.platform), np.ones((n, r), np.float32)
    product = functools.partial(latents.apply, scale=ones, mixer=plan.spec.mixer, strategy=strategy)
    return jax.vjp(lambda a, b: product(x, a * to_left, b), a, b)[1](cotangent)


def _products_of_blocks(plan: ProductPlan, x: Array, cotangent: Array) -> Array:
    """x_kᵀg_k of each mini, `[n i o]`."""
    n = len(_scale(plan))
    if plan.platform == "cpu":
        return xla_cpu.products_of_blocks(x, cotangent, n)
    return jnp.einsum("tni,tno->nio", x.reshape(len(x), n, -1), cotangent.reshape(len(x), n, -1))


def _after(plan: ProductPlan, gradient: Array, factor: Array) -> Array:
    """The factor, but not before its gradient is computed."""
    if plan.platform == "cpu":
        return xla_cpu.after(gradient, factor)
    return jax.lax.optimization_barrier((factor, gradient))[0]


def _scale(plan: ProductPlan) -> Any:
    """s_k of each latent that is computed, [n r]."""
    scale = scale_of(plan.spec)
    return scale if plan.cut is None else plan.cut.scale(jnp.asarray(scale))


def _dot(x: Array, kernel: Array, precision: Any) -> Array:
    return jnp.matmul(_wide(x), _wide(kernel), precision=precision)


def _wide(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def merged_kernel(
    spec: AdapterSpec, view: DenseView, kernel: Array, a: Float[Array, "n i r"], b: Float[Array, "n r o"]
) -> Array:
    """W + ΔW in the kernel's layout and dtype, summed in float32 at least, for good: what `merge` writes."""
    update = delta(a, b, scale_of(spec), spec.mixer)
    return (_wide(kernel) + view.unflatten_kernel(update, kernel.shape)).astype(kernel.dtype)
