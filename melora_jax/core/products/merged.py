"""The strategy `merged`: a dense product with W + ΔW, formed anew at each step, in place of two products and their sum.

Beside the base's own products there remain the gradients of the factors (`factor_gradients`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from melora_jax.config import AdapterSpec, Mixer
from melora_jax.core import blocks
from melora_jax.core.products.block_diagonal import add_block_diagonal, block_diagonal, exact_product
from melora_jax.core.products.device_part import at_own_part, own_part
from melora_jax.core.products.factor_gradients import Scale, factor_gradients, takes_blocks

Precision = Any


class OwnAxis(NamedTuple):
    """The axis of a kernel along which a device's minis have its own part alone, and the mesh axis that cuts it."""

    number: int
    over: str


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
    return _product(x, kernel, a, b, blocks.scale_of(spec), spec.mixer, precision, None)


def _by_sum(
    x: Array,
    kernel: Array,
    a: Array,
    b: Array,
    scale: Scale,
    mixer: Mixer,
    precision: Precision,
    own_axis: OwnAxis | None,
) -> Array:
    """The same; inside a `shard_map` of one device's parts."""
    y = _dot(x, _formed(kernel, a, b, scale, mixer, own_axis), precision)
    return y.astype(jnp.promote_types(x.dtype, kernel.dtype))


_product = jax.custom_vjp(_by_sum, nondiff_argnums=(5, 6, 7))


def _forward(
    x: Any, kernel: Any, a: Any, b: Any, scale: Any, mixer: Mixer, precision: Precision, own_axis: OwnAxis | None
) -> tuple[Array, Any]:
    return _by_sum(x, kernel, a, b, scale, mixer, precision, own_axis), (x, kernel, a, b, scale)


def _backward(
    mixer: Mixer, precision: Precision, own_axis: OwnAxis | None, kept: Any, cotangent: Array
) -> tuple[Array | None, ...]:
    given, kernel, a, b, scale = kept
    x, cotangent = (array.reshape(-1, array.shape[-1]) for array in (given, cotangent))
    read = own_part(x, own_axis.over) if own_axis is not None and own_axis.number == 0 else x
    written = own_part(cotangent, own_axis.over) if own_axis is not None and own_axis.number == 1 else cotangent
    read, wide_a, wide_b, written = (_wide(array) for array in (read, a, b, written))
    to_a, to_b = factor_gradients(read, wide_a, wide_b, scale, written, mixer)
    held = a if _stays(len(x), a, b, mixer) else _after(to_a, a)
    to_x = _dot(cotangent, _formed(kernel, held, b, scale, mixer, own_axis).T, precision)
    to_kernel = _dot(x.T, cotangent, precision)  # of a frozen kernel nobody asks for it, and XLA leaves it out
    gradients = to_x.reshape(given.shape), to_kernel, to_a, to_b
    return *(to.astype(of.dtype) for to, of in zip(gradients, kept, strict=False)), None


_product.defvjp(_forward, _backward)


def _stays(tokens: int, a: Array, b: Array, mixer: Mixer) -> bool:
    """Whether the backward pass may take the forward pass's W + ΔW, and need not wait for the factors' gradients.

    It may then be multiplied beside the blocks of xᵀg, which a second processor speeds up little (384 x 384, n=32: 1.25
    ms for 1.73). Over the frozen limit MiniLM's step, all layers, takes 1.22 for 1.26 (n=2 r=16; 697 MB for 685),
    1.17 for 1.21 (n=4 r=8; 709 for 680) and 1.08 for 1.11 (n=32 r=1; 694 for 667), SmolLM2's (n=8 r=8) 1.17 for 1.26,
    but 2,123 MB for 1,700. So it stays where W has at most a fifth of the entries of the layer's input and output. Not
    where the output is the wider: 14 MB more, and no faster for certain (n=4 and n=8, r=8). Nor with latents, which are
    held as well (n=8 r=1 714 MB as it is).
    """
    (n, i, _), o = a.shape, b.shape[2]
    return takes_blocks(a, b, mixer) and o <= i and 5 * n * i * o <= tokens * (i + o)


def _after(gradient: Array, factor: Array) -> Array:
    """The factor, once its gradient is there.

    So the backward pass forms W + ΔW anew, when it needs it: XLA would keep the forward pass's, and on CPU, which does
    first what waits for nothing, those of all layers formed at once (SmolLM2, n=4 r=8, all linear layers: 2,032 MB for
    1,688). What is no number has no gradient either.
    """
    flat = gradient.reshape(len(gradient), -1)  # XLA moves an axis of one, and would copy it back for the sum
    return (factor.reshape(flat.shape) + (flat - flat)).reshape(factor.shape)


def _dot(x: Array, kernel: Array, precision: Precision) -> Array:
    return jnp.matmul(_wide(x), _wide(kernel), precision=precision)


def _wide(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _formed(kernel: Array, a: Array, b: Array, scale: Scale, mixer: Mixer, own_axis: OwnAxis | None) -> Array:
    """W + ΔW."""
    if mixer == "identity":
        a = a * scale[:, None, :]
        if own_axis is None:
            return add_block_diagonal(kernel, a, b)
        return kernel + _in_place(block_diagonal(exact_product(a, b)), own_axis)
    return kernel + exact_product(*blocks.packed_factors(a, b, scale, mixer))


def _in_place(delta: Array, own_axis: OwnAxis) -> Array:
    """This device's minis' ΔW, in its place along the axis."""
    return at_own_part(delta, own_axis.over) if own_axis.number == 1 else at_own_part(delta.T, own_axis.over).T
