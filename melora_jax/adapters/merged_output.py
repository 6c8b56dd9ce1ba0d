"""A dense layer's output with its adapter as one product with W + ΔW, on one device or cut over a mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

from melora_jax.adapters.tensor_parallel import why_whole
from melora_jax.config import AdapterSpec
from melora_jax.core import blocks
from melora_jax.core.products.merged import OwnAxis, Precision, _product, merged_product
from melora_jax.nn.parallel import KernelCut, ParallelLinear
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.sharding import DATA, FSDP, TENSOR, batch_spec, mesh_of


def why_unmergeable(base: Any, spec: AdapterSpec) -> str | None:
    """Why a layer's kernel and ΔW cannot be summed in a pass; None where they can."""
    if not isinstance(base, nnx.Linear | QuantizedLinear):
        return f"a {type(base).__name__} is no dense layer nnx.Linear"
    if isinstance(base, QuantizedLinear):
        mesh = mesh_of(base.codes.get_raw_value())
        return "its quantised kernel lies on a mesh" if mesh is not None and mesh.size > 1 else None
    if base.dot_general is not jax.lax.dot_general:
        return "the layer has a dot_general of its own"
    mesh = mesh_of(base.kernel.get_raw_value())
    if mesh is None or mesh.size == 1:
        return None
    ours = isinstance(base, ParallelLinear)
    return why_unmergeable_on(mesh.abstract_mesh, base, spec) if ours else "the kernel lies on a mesh"


def why_unmergeable_on(mesh: AbstractMesh, base: Any, spec: AdapterSpec) -> str | None:
    """Why a layer of ours can't on a mesh: its kernel would need minis that the device does not have."""
    if isinstance(base, QuantizedLinear):
        return "its quantised kernel lies on a mesh"
    whole = None if base.cut.form(mesh) == "whole" else why_whole(spec, mesh.shape[TENSOR])
    return whole and f"its kernel is cut over tensor, its minis are not, as {whole}"


def merged_output(base: Any, x: Array, a: Array, b: Array, spec: AdapterSpec, mesh: AbstractMesh | None) -> Array:
    """The output of a dense layer with its adapter, x·(W + ΔW) + bias; with a mesh, cut as the layer is on it."""
    bias: Any = None if base.bias is None else base.bias[...]
    y: Any
    if isinstance(base, nnx.Linear):
        x, kernel, bias = base.promote_dtype((x, base.kernel[...], bias), dtype=base.dtype)
        cut: Any = getattr(base, "cut", None)
        product = merged_product if mesh is None else functools.partial(_product_on_mesh, cut, mesh)
        y = product(x, kernel, a, b, spec, base.precision)
        y = y if base.preferred_element_type is None else y.astype(base.preferred_element_type)
    else:
        y = merged_product(x.astype(base.dtype), base.kernel, a, b, spec)
    return y if bias is None else y + bias.astype(y.dtype)


def _product_on_mesh(
    cut: KernelCut,
    mesh: AbstractMesh,
    x: Array,
    kernel: Array,
    a: Array,
    b: Array,
    spec: AdapterSpec,
    precision: Precision,
) -> Array:
    """`merged_product`, each device summing its part of W with its own minis."""
    form = cut.form(mesh)
    own_axis = {"column": OwnAxis(0, TENSOR), "row": OwnAxis(1, TENSOR), "whole": None}[form]
    along = PartitionSpec() if form == "whole" else PartitionSpec(TENSOR)

    rows = tuple(axis for axis in (DATA, FSDP) if axis in jax.tree.leaves(tuple(batch_spec(x.shape, mesh))))

    def local(x: Array, *weights: Array) -> Array:
        # Their gradients differ from device to device, as the rows do; leaving the shard_map they are summed.
        kernel, a, b, scale = (jax.lax.pcast(weight, rows, to="varying") for weight in weights) if rows else weights
        return _product(x, kernel, a, b, scale, spec.mixer, precision, own_axis)

    weights = kernel, a, b, jnp.asarray(blocks.scale_of(spec))
    return cut.product_by(local, x, weights, (cut.kernel_spec(mesh), along, along, along))
