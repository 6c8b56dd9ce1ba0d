"""A frozen base in int8 or nf4 (through qwix): dense layers that hold codes and scales in place of a kernel.

Only what `adapt` freezes can be quantised: adapters stay float32, and gradients pass through to the layer's input.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from melora_jax.nn.parallel import KernelCut, LocalProduct, ParallelLinear, cut_product, require_mesh
from melora_jax.nn.sharding import active_mesh, mesh_of
from melora_jax.nn.tree import path_of, rewrite, walk

QType = Literal["int8", "nf4"]
_LARGEST_TILE = 64  # as in QLoRA (arXiv 2305.14314, section 4)

_log = logging.getLogger("melora_jax")


class QuantizedParam(nnx.Param):
    """Codes or scales of a quantised kernel. `adapt` freezes them; they can't be trained."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The result of `quantize`.

    Attributes:
      qtype: "int8" or "nf4".
      layers: the number of quantised layers.
      before, after: bytes of their kernels, including scales.

    >>> print(Quantization("nf4", 12, 28_311_552, 3_981_312))
    12 kernels quantised to nf4, from 28.3 MB to 4.0 MB
    """

    qtype: QType
    layers: int
    before: int
    after: int

    def __str__(self) -> str:
        sizes = f"{self.before / 1e6:,.1f} MB to {self.after / 1e6:,.1f} MB"
        return f"{self.layers} kernels quantised to {self.qtype}, from {sizes}"


class QuantizedLinear(nnx.Module):
    """A dense layer `y = x·W_q + bias` whose kernel is quantised; each pass, forward and backward, forms W_q again.

    nf4 has one scale for each run of up to 64 inputs of an output (the most that divide d_in), int8 one an output.

    Args:
      layer: the layer to take over; its bias stays as it is.
      qtype: "int8" or "nf4".

    Source: QLoRA (arXiv 2305.14314), sections 2 and 3, without quantising the scales themselves.
    """

    def __init__(self, layer: nnx.Linear, qtype: QType) -> None:
        kernel = layer.kernel[...]
        quantized = _quantized_in_place(kernel, qtype)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.qtype: QType = qtype
        self.dtype = jnp.dtype(layer.dtype or kernel.dtype)
        self.codes = QuantizedParam(quantized.qvalue)
        self.scale = QuantizedParam(quantized.scale)
        self.bias = layer.bias
        self.cut: KernelCut | None = layer.cut if isinstance(layer, ParallelLinear) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        if active_mesh() is not None and self.cut is not None:
            own = self.local_product(x)
            y: Any = cut_product(self.cut, own.dot, own.x, own.weights, own.specs)
        else:
            y = _product(x.astype(self.dtype), self.codes[...], self.scale[...], self.qtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def local_product(self, x: jax.Array) -> LocalProduct:
        """The layer's product on the mesh in force, for `cut_product`: each device makes its part of W_q."""
        codes, scale, mesh = self.codes[...], self.scale[...], require_mesh()
        kernel, tile = (self.cut or KernelCut()).kernel_spec(mesh), self.in_features // scale.shape[0]
        over_in, over_out = kernel
        whole = over_in is not None and scale.shape[0] % mesh.shape[over_in] != 0

        def dot(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
            if whole and scale.shape[0] > 1:
                # Tiles that reach over the edges between devices: take the scale of each of the device's own inputs.
                first = jax.lax.axis_index(over_in) * codes.shape[0]
                scale = jnp.take(scale, (first + jnp.arange(codes.shape[0])) // tile, axis=0)
            return _product(x, codes, scale, self.qtype)

        specs = (kernel, PartitionSpec(None if whole else over_in, over_out))
        bias = None if self.bias is None else self.bias[...].astype(self.dtype)
        return LocalProduct(dot, x.astype(self.dtype), (codes, scale), specs, bias)

    @property
    def kernel(self) -> jax.Array:
        """W_q, `[d_in, d_out]` in the dtype of the computation."""
        return _dequantized(self.codes[...], self.scale[...], self.qtype).astype(self.dtype)

    def dequantized(self) -> nnx.Linear:
        """A plain layer that computes the same."""
        kind = nnx.Linear if self.cut is None else ParallelLinear
        layer = nnx.eval_shape(
            lambda: kind(self.in_features, self.out_features, use_bias=False, dtype=self.dtype, rngs=nnx.Rngs(0))
        )
        if isinstance(layer, ParallelLinear) and self.cut is not None:
            layer.cut = self.cut
        layer.kernel = nnx.Param(self.kernel)
        layer.use_bias, layer.bias = self.bias is not None, self.bias
        return layer


def quantize(model: nnx.Module, qtype: QType) -> Quantization:
    """Quantises the dense layers of a model's numbered layers, in place; embeddings, norms and heads stay as they are.

    Call it before `adapt`, which freezes what it made. `merge` turns the layers back into plain ones, of the quantised
    values: what the quantisation rounded stays rounded. On a mesh codes and scales lie as the kernels did.

    Args:
      model: a model whose parameters are loaded.
      qtype: "int8" (8 bits a weight and a scale an output) or "nf4" (4 bits a weight and a scale for 64).

    Raises:
      ValueError: the type is unknown, the model has no such layers, or was quantised or adapted before; or qwix is not
        installed.

    >>> model = nnx.List([nnx.Linear(128, 24, rngs=nnx.Rngs(0))])
    >>> print(quantize(nnx.Sequential(*model), "nf4"))
    1 kernels quantised to nf4, from 0.0 MB to 0.0 MB
    """
    if qtype not in ("int8", "nf4"):
        raise ValueError(f"qtype {qtype!r} is unknown; choose int8 or nf4")
    found = {id(node): path_of(path) for path, node in walk(model) if isinstance(node, nnx.Linear)}
    chosen = {identity for identity, path in found.items() if re.search(r"(?:^|/)\d+(?:/|$)", path)}
    if not chosen:
        kind = type(model).__name__
        raise ValueError(
            f"{kind} has no plain nnx.Linear in numbered layers to quantise; load it again and quantise first"
        )
    made: dict[int, QuantizedLinear] = {}
    before = 0

    def swap(path: Any, node: Any) -> Any:
        nonlocal before
        if id(node) in chosen and id(node) not in made:
            before += _bytes(node.kernel[...])
            made[id(node)] = QuantizedLinear(node, qtype)
        return made.get(id(node), node)

    rewrite(model, swap)
    after = sum(_bytes(layer.codes[...]) + _bytes(layer.scale[...]) for layer in made.values())
    report = Quantization(qtype, len(made), before, after)
    _log.info("%s", report)
    return report


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, codes: jax.Array, scale: jax.Array, qtype: QType) -> jax.Array:
    return x @ _dequantized(codes, scale, qtype).astype(x.dtype)


def _forward(x: jax.Array, codes: jax.Array, scale: jax.Array, qtype: QType) -> tuple[jax.Array, Any]:
    return _product(x, codes, scale, qtype), (codes, scale)


def _backward(qtype: QType, kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    # Without the barrier XLA would see the same W_q twice, and keep the forward pass's for the backward pass.
    codes, scale, cotangent = jax.lax.optimization_barrier((*kept, cotangent))
    return cotangent @ _dequantized(codes, scale, qtype).astype(cotangent.dtype).T, None, None


_product.defvjp(_forward, _backward)


def _quantized_in_place(kernel: jax.Array, qtype: QType) -> Any:
    """The same where the kernel lies: on a mesh, codes and scales are cut as it is, scales where there are enough."""
    mesh, sharding = mesh_of(kernel), getattr(kernel, "sharding", None)
    if mesh is None or not isinstance(sharding, NamedSharding):
        return _quantized(kernel, qtype)

    def placed(part: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [*sharding.spec, *[None] * (kernel.ndim - len(sharding.spec))]
        cut = (
            axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, part.shape, strict=True)
        )
        return NamedSharding(mesh, PartitionSpec(*cut))

    make = functools.partial(_quantized, qtype=qtype)
    return jax.jit(make, out_shardings=jax.tree.map(placed, jax.eval_shape(make, kernel)))(kernel)


def _quantized(kernel: jax.Array, qtype: QType) -> Any:
    """A qwix `QArray` of a kernel `[d_in, d_out]`."""
    tile = max(size for size in range(1, _LARGEST_TILE + 1) if kernel.shape[0] % size == 0)
    tiles = {0: tile} if qtype == "nf4" else None
    return _qwix().quantize(kernel.astype(jnp.float32), qtype, channelwise_axes=[1], tiled_axes=tiles)


def _dequantized(codes: jax.Array, scale: jax.Array, qtype: QType) -> jax.Array:
    """W_q in float32."""
    qwix = _qwix()
    return qwix.dequantize(qwix.QArray(codes, scale, None, qtype))


def _qwix() -> Any:
    # Optional, so types are checked without it.
    try:
        return importlib.import_module("qwix")
    except ModuleNotFoundError as error:
        raise ValueError("quantising needs qwix; install it: pip install 'melora_jax[quant]'") from error


def _bytes(array: jax.Array) -> int:
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    return array.size * (jnp.iinfo(array.dtype).bits if integer else 8 * array.dtype.itemsize) // 8
