"""The strategy `merged`: a dense product with W + ΔW, formed anew at each pass, in place of two products and their sum.

Beside the base's own products there remain the gradients of the factors, which need ΔW's gradient at its diagonal
blocks alone: as one product a block, or, where n is small, by way of the latents.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from melora_jax import blocks
from melora_jax.block_diagonal import block_diagonal
from melora_jax.config import AdapterSpec, Mixer
from melora_jax.parallel import ParallelDot, at_own_part, own_part
from melora_jax.quantization import QuantizedLinear
from melora_jax.sharding import DATA, FSDP, TENSOR, batch_spec, mesh_of
from melora_jax.slices import why_whole
from melora_jax.strategies import choose_strategy, sums_columns

Precision = Any
# The axis of a kernel along which a device's minis have only its own part over `tensor`; None: they have all of it.
OwnAxis = int | None


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
    return _product(x, kernel, a * blocks.scale_of(spec)[:, None, :], b, spec.mixer, precision, None)


def _by_sum(
    x: Array, kernel: Array, a: Array, b: Array, mixer: Mixer, precision: Precision, own_axis: OwnAxis
) -> Array:
    """The same with the scale multiplied into `a`; inside a `shard_map` of one device's parts."""
    y = _dot(x, _formed(kernel, a, b, mixer, own_axis), precision)
    return y.astype(jnp.promote_types(x.dtype, kernel.dtype))


_product = jax.custom_vjp(_by_sum, nondiff_argnums=(4, 5, 6))


def _forward(
    x: Any, kernel: Any, a: Any, b: Any, mixer: Mixer, precision: Precision, own_axis: OwnAxis
) -> tuple[Array, Any]:
    return _by_sum(x, kernel, a, b, mixer, precision, own_axis), (x, kernel, a, b)


def _backward(mixer: Mixer, precision: Precision, own_axis: OwnAxis, kept: Any, cotangent: Array) -> tuple[Array, ...]:
    x, kernel, a, b = kept
    read = own_part(x) if own_axis == 0 else x
    written = own_part(cotangent) if own_axis == 1 else cotangent
    to_a, to_b = _to_factors(read.astype(a.dtype), a, b, written.astype(a.dtype), mixer)
    to_x = _dot(cotangent, _formed(kernel, _after(to_a, a), b, mixer, own_axis).T, precision)
    # Of a frozen kernel nobody asks for it, and XLA leaves it out.
    to_kernel = _dot(x.reshape(-1, x.shape[-1]).T, cotangent.reshape(-1, cotangent.shape[-1]), precision)
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype), to_a, to_b


_product.defvjp(_forward, _backward)


def _after(gradient: Array, factor: Array) -> Array:
    """The factor, once its gradient is there.

    So the backward pass forms W + ΔW anew, when it needs it: XLA would keep the forward pass's, and on CPU, which does
    first what waits for nothing, those of all layers formed at once (SmolLM2, n=4 r=8, all linear layers: 2,032 MB for
    1,688). What is no number has no gradient either.
    """
    return factor + (gradient - gradient)


def _dot(x: Array, kernel: Array, precision: Precision) -> Array:
    wide = jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
    return jnp.matmul(x.astype(wide), kernel.astype(wide), precision=precision)


def _formed(kernel: Array, a: Array, b: Array, mixer: Mixer, own_axis: OwnAxis) -> Array:
    """W + ΔW."""
    if mixer == "identity":
        return kernel + _in_place(block_diagonal(_exact(a, b)), own_axis)
    return kernel + _exact(*blocks.packed_factors(a, b, _ones(a), mixer))


def _in_place(delta: Array, own_axis: OwnAxis) -> Array:
    """This device's minis' ΔW, in its place along the axis."""
    if own_axis is None:
        return delta
    return at_own_part(delta) if own_axis == 1 else at_own_part(delta.T).T


def _to_factors(x: Array, a: Array, b: Array, cotangent: Array, mixer: Mixer) -> tuple[Array, Array]:
    """The gradients of A and B, dA_k = (x_kᵀg_k)·B_kᵀ and dB_k = A_kᵀ·(x_kᵀg_k)."""
    if _by_blocks(a, b, mixer):
        products = _products_of_blocks(x, cotangent, len(a))
        return jnp.einsum("nio,nro->nir", products, b), jnp.einsum("nir,nio->nro", a, products)
    strategy = choose_strategy("auto", a.shape[0] * a.shape[2], jax.default_backend())
    return jax.vjp(lambda a, b: blocks.apply(x, a, b, _ones(a), mixer, strategy), a, b)[1](cotangent)


def _ones(a: Array) -> np.ndarray:
    """The scale of factors that it has been multiplied into."""
    return np.ones((a.shape[0], a.shape[2]), np.float32)


def _products_of_blocks(x: Array, cotangent: Array, n: int) -> Array:
    """x_kᵀg_k of each block, `[n, i, o]`."""
    x, cotangent = (array.reshape(-1, array.shape[-1]) for array in (x, cotangent))
    i, o = x.shape[1] // n, cotangent.shape[1] // n
    if jax.default_backend() != "cpu":
        return jnp.einsum("tni,tno->nio", x.reshape(-1, n, i), cotangent.reshape(-1, n, o))
    # XLA on CPU would transpose both, for an axis of blocks; columns it takes as they lie. The narrower stands on the
    # left, which is dearer to pack (1536 by 384: 4.7 : 3.0 ms).
    return _by_columns(x, cotangent, n) if i <= o else _by_columns(cotangent, x, n).swapaxes(1, 2)


def _by_columns(left: Array, right: Array, n: int) -> Array:
    """left_kᵀ·right_k of each of n blocks, one after another, `[n, columns of left / n, columns of right / n]`."""

    def of_block(k: Array, _: None) -> tuple[Array, Array]:
        return k + 1, _columns(left, k, n).T @ _columns(right, k, n)

    return jax.lax.scan(of_block, jnp.int32(0), length=n)[1]


def _columns(array: Array, k: Array, n: int) -> Array:
    """The k-th of n slices of the columns."""
    rows, width = array.shape[0], array.shape[1] // n
    return jax.lax.dynamic_slice(array, (0, k * width), (rows, width), allow_negative_indices=False)


def _by_blocks(a: Array, b: Array, mixer: Mixer) -> bool:
    """Whether the blocks x_kᵀg_k, d_in·d_out / n multiplications a token, cost less than products with n·r latents.

    Those, n·r·(d_in + d_out) packed, count three times, being so narrow, and a quarter where r is 1, being half as many
    and one pass over x and g each (`block_diagonal_product`). Measured on two CPU cores by MiniLM's step, all linear
    layers adapted, over the frozen limit, blocks : latents: n=4 r=1 1.15 : 1.06, n=8 r=1 1.17 : 1.07, n=16 r=1 1.11 :
    1.07, n=32 r=1 1.14 : 1.15 (1.12 by this rule); n=2 r=8 1.33 : 1.17, n=4 r=8 1.19 : 1.24, n=8 r=8 1.16 : 1.82.
    """
    (n, i, r), o = a.shape, b.shape[2]
    weight = 0.25 if sums_columns(n, r, jax.default_backend()) else 3
    return mixer == "identity" and i * o <= weight * n * r * (i + o)


def _exact(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def why_unmergeable(base: Any, spec: AdapterSpec) -> str | None:
    """Why a layer's kernel and ΔW cannot be summed in a pass; None where they can."""
    if not isinstance(base, nnx.Linear | QuantizedLinear):
        return f"a {type(base).__name__} is no dense layer nnx.Linear"
    if isinstance(base, QuantizedLinear):
        mesh = mesh_of(base.codes.get_raw_value())
        return "its quantised kernel lies on a mesh" if mesh is not None and mesh.size > 1 else None
    ours = isinstance(base.dot_general, ParallelDot)
    if not (ours or base.dot_general is jax.lax.dot_general):
        return "the layer has a dot_general of its own"
    mesh = mesh_of(base.kernel.get_raw_value())
    if mesh is None or mesh.size == 1:
        return None
    return why_unmergeable_on(mesh.abstract_mesh, base, spec) if ours else "the kernel lies on a mesh"


def why_unmergeable_on(mesh: AbstractMesh, base: Any, spec: AdapterSpec) -> str | None:
    """Why a layer of ours can't on a mesh: its kernel would need minis that the device does not have."""
    if isinstance(base, QuantizedLinear):
        return "its quantised kernel lies on a mesh"
    whole = None if base.dot_general.form(mesh) == "whole" else why_whole(spec, mesh.shape[TENSOR])
    return whole and f"its kernel is cut over tensor, its minis are not, as {whole}"


def merged_output(base: Any, x: Array, a: Array, b: Array, spec: AdapterSpec, mesh: AbstractMesh | None) -> Array:
    """The output of a dense layer with its adapter, x·(W + ΔW) + bias; with a mesh, cut as the layer is on it."""
    bias: Any = None if base.bias is None else base.bias[...]
    y: Any
    if isinstance(base, nnx.Linear):
        x, kernel, bias = base.promote_dtype((x, base.kernel[...], bias), dtype=base.dtype)
        dot: Any = base.dot_general
        product = merged_product if mesh is None else functools.partial(_product_on_mesh, dot, mesh)
        y = product(x, kernel, a, b, spec, base.precision)
        y = y if base.preferred_element_type is None else y.astype(base.preferred_element_type)
    else:
        y = merged_product(x.astype(base.dtype), base.kernel, a, b, spec)
    return y if bias is None else y + bias.astype(y.dtype)


def _product_on_mesh(
    dot: ParallelDot,
    mesh: AbstractMesh,
    x: Array,
    kernel: Array,
    a: Array,
    b: Array,
    spec: AdapterSpec,
    precision: Precision,
) -> Array:
    """`merged_product`, each device summing its part of W with its own minis."""
    form = dot.form(mesh)
    own_axis = {"column": 0, "row": 1, "whole": None}[form]
    along = PartitionSpec() if form == "whole" else PartitionSpec(TENSOR)

    rows = tuple(axis for axis in (DATA, FSDP) if axis in jax.tree.leaves(tuple(batch_spec(x.shape, mesh))))

    def local(x: Array, *weights: Array) -> Array:
        # Their gradients differ from device to device, as the rows do; leaving the shard_map they are summed.
        kernel, a, b = (jax.lax.pcast(weight, rows, to="varying") for weight in weights) if rows else weights
        return _product(x, kernel, a, b, spec.mixer, precision, own_axis)

    factors = a * blocks.scale_of(spec)[:, None, :], b
    return dot.product_by(local, x, (kernel, *factors), (dot.kernel_spec(mesh), along, along))
