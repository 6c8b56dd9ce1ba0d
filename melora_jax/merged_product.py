"""The strategy `merged`: a dense product with W + ΔW, formed anew at each pass, in place of two products and their sum.

Beside the base's own products there remain the gradients of the factors, which need ΔW's gradient at its diagonal
blocks alone: as one product a block, or, where n is small, by way of the latents.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from melora_jax import blocks
from melora_jax.config import AdapterSpec
from melora_jax.parallel import ParallelDot
from melora_jax.quantization import QuantizedLinear
from melora_jax.sharding import mesh_of

Precision = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def merged_product(
    x: Float[Array, "... d_in"],
    kernel: Float[Array, "d_in d_out"],
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
    spec: AdapterSpec,
    precision: Precision = None,
) -> Float[Array, "... d_out"]:
    """x·(W + ΔW), summed and multiplied in float32 at least: in bfloat16 a young ΔW would vanish beside W.

    Args:
      x: the input.
      kernel: W.
      a, b: the factors; where ranks differ, padded to the widest.
      spec: the adapter, of which scale and mixer are used.
      precision: of the product.

    Returns:
      An array of the dtype to which those of `x` and `kernel` promote.

    >>> spec = AdapterSpec(n=2, r=(1, 1), alpha=(1.0, 2.0))
    >>> one = jnp.ones((2, 1, 1))
    >>> merged_product(jnp.array([3.0, 5.0]), jnp.ones((2, 2)), one, one, spec).tolist()
    [11.0, 18.0]
    """
    y = _dot(x, _formed(kernel, a, b, spec), precision)
    return y.astype(jnp.promote_types(x.dtype, kernel.dtype))


def _forward(x: Any, kernel: Any, a: Any, b: Any, spec: AdapterSpec, precision: Precision) -> tuple[Array, Any]:
    return merged_product(x, kernel, a, b, spec, precision), (x, kernel, a, b)


def _backward(spec: AdapterSpec, precision: Precision, kept: Any, cotangent: Array) -> tuple[Array, ...]:
    x, kernel, a, b = kept
    to_x = _dot(cotangent, _formed_transposed(kernel, a, b, spec), precision)
    to_a, to_b = _to_factors(x.astype(a.dtype), a, b, cotangent.astype(a.dtype), spec)
    # Of a frozen kernel nobody asks for it, and XLA leaves it out.
    to_kernel = _dot(x.reshape(-1, x.shape[-1]).T, cotangent.reshape(-1, cotangent.shape[-1]), precision)
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype), to_a, to_b


merged_product.defvjp(_forward, _backward)


def _dot(x: Array, kernel: Array, precision: Precision) -> Array:
    wide = jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
    return jnp.matmul(x.astype(wide), kernel.astype(wide), precision=precision)


def _formed(kernel: Array, a: Array, b: Array, spec: AdapterSpec) -> Array:
    """W + ΔW."""
    scale = blocks.scale_of(spec)
    if spec.mixer == "identity":
        return kernel + blocks.block_diagonal(_exact(a * scale[:, None, :], b))
    return kernel + _exact(*blocks.packed_factors(a, b, scale, spec.mixer))


def _formed_transposed(kernel: Array, a: Array, b: Array, spec: AdapterSpec) -> Array:
    """(W + ΔW)ᵀ, from products of its own: XLA would keep the forward pass's copy for the backward pass."""
    scale = blocks.scale_of(spec)
    if spec.mixer == "identity":
        return kernel.T + blocks.block_diagonal(_exact(b.swapaxes(1, 2), (a * scale[:, None, :]).swapaxes(1, 2)))
    left, right = blocks.packed_factors(a, b, scale, spec.mixer)
    return kernel.T + _exact(right.T, left.T)


def _to_factors(x: Array, a: Array, b: Array, cotangent: Array, spec: AdapterSpec) -> tuple[Array, Array]:
    """The gradients of A and B: dA_k = s_k·(x_kᵀg_k)·B_kᵀ, dB_k = s_k·A_kᵀ·(x_kᵀg_k)."""
    scale = blocks.scale_of(spec)
    if spec.mixer == "identity" and _by_blocks(a, b):
        n, i, _ = a.shape
        of_blocks = jnp.einsum("tni,tno->nio", x.reshape(-1, n, i), cotangent.reshape(-1, n, b.shape[2]))
        return jax.vjp(lambda a, b: jnp.matmul(a * scale[:, None, :], b), a, b)[1](of_blocks)
    strategy = blocks.choose_strategy("auto", a.shape[0] * a.shape[2], jax.default_backend())
    return jax.vjp(lambda a, b: blocks.apply(x, a, b, scale, spec.mixer, strategy), a, b)[1](cotangent)


def _by_blocks(a: Array, b: Array) -> bool:
    """Whether the blocks x_kᵀg_k, d_in·d_out / n multiplications a token, cost less than four products with latents.

    Those, 2·r·(d_in + d_out), count three times, being so narrow (measured on CPU at d_in = 384 and 576).
    """
    (n, i, r), o = a.shape, b.shape[2]
    return n * i * o <= 6 * r * n * (i + o)


def _exact(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def why_unmergeable(base: Any) -> str | None:
    """Why a layer's kernel and ΔW cannot be summed in a pass; None where they can."""
    if not isinstance(base, nnx.Linear | QuantizedLinear):
        return f"a {type(base).__name__} is no dense layer nnx.Linear"
    if isinstance(base, nnx.Linear):
        if not (base.dot_general is jax.lax.dot_general or isinstance(base.dot_general, ParallelDot)):
            return "the layer has a dot_general of its own"
        mesh = mesh_of(base.kernel.get_raw_value())
        if mesh is not None and mesh.size > 1:
            return "the kernel lies on a mesh"
    return None


def merged_output(base: Any, x: Array, a: Array, b: Array, spec: AdapterSpec) -> Array:
    """The output of a dense layer with its adapter: x·(W + ΔW) + bias."""
    bias: Any = None if base.bias is None else base.bias[...]
    y: Any
    if isinstance(base, nnx.Linear):
        x, kernel, bias = base.promote_dtype((x, base.kernel[...], bias), dtype=base.dtype)
        y = merged_product(x, kernel, a, b, spec, base.precision)
        y = y if base.preferred_element_type is None else y.astype(base.preferred_element_type)
    else:
        y = merged_product(x.astype(base.dtype), base.kernel, a, b, spec)
    return y if bias is None else y + bias.astype(y.dtype)
