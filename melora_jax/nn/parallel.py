"""Dense layers and tables that may be cut over a mesh: one `jax.shard_map` with no collective but the layer's own.

A kernel cut over `tensor` by its outputs (column-parallel) gives cut outputs and needs nothing; one cut by its inputs
(row-parallel) takes cut inputs and sums its partial outputs, once. Kernels cut over `fsdp` are gathered on the way in.
XLA's partitioner, left to choose, has been seen to give wrong products on meshes of three axes; here it has no choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike

from melora_jax.core.products.cut import Form
from melora_jax.core.products.product import dense_product
from melora_jax.nn.sharding import TENSOR, active_mesh, batch_spec, mesh_of


class LocalProduct(NamedTuple):
    """The product of a layer on the mesh in force, ready for `cut_product`.

    Attributes:
      dot: `(x, *weights) -> y` on one device's parts.
      x: the layer's input.
      weights: what `dot` takes beside it.
      specs: how each of the weights is cut.
      bias: what is added at the end, or None.
    """

    dot: Callable[..., jax.Array]
    x: jax.Array
    weights: tuple[jax.Array, ...]
    specs: tuple[PartitionSpec, ...]
    bias: jax.Array | None


@dataclasses.dataclass(frozen=True)
class KernelCut:
    """How `tensor` may cut a kernel `[d_in, d_out]`.

    Attributes:
      inputs, outputs: between how many units it may cut d_in and d_out; None where it may not.
    """

    inputs: int | None = None
    outputs: int | None = None

    def form(self, mesh: AbstractMesh) -> Form:
        """How the kernel is cut on a mesh.

        >>> mesh = AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor"))
        >>> KernelCut(None, 4).form(mesh), KernelCut(4, None).form(mesh), KernelCut(None, 3).form(mesh)
        ('column', 'row', 'whole')
        """
        if self.outputs is not None and self.outputs % mesh.shape[TENSOR] == 0:
            return "column"
        return "row" if self.inputs is not None and self.inputs % mesh.shape[TENSOR] == 0 else "whole"

    def kernel_spec(self, mesh: AbstractMesh) -> PartitionSpec:
        """How the kernel lies inside the product, gathered over fsdp."""
        form = self.form(mesh)
        return PartitionSpec(TENSOR if form == "row" else None, TENSOR if form == "column" else None)

    def dot(
        self, x: jax.Array, kernel: jax.Array, precision: Any = None, output_dtype: DTypeLike | None = None
    ) -> jax.Array:
        """x·kernel, cut where a mesh is in force.

        Args:
          x: `[..., d_in]`, the first axis being the batch.
          kernel: `[d_in, d_out]`.
          precision, output_dtype: as `precision` and `preferred_element_type` of `jax.lax.dot_general`.

        Raises:
          ValueError: the kernel is seen to lie on a mesh that is not in force: XLA would be left to partition.
        """
        if active_mesh() is None:
            require_one_device(kernel)
            return dense_product(x, kernel, precision, output_dtype)
        return self.product(x, kernel, precision, output_dtype)

    def product(self, x: jax.Array, kernel: jax.Array, precision: Any, output_dtype: DTypeLike | None) -> jax.Array:
        """x·kernel on the mesh in force."""
        local = functools.partial(dense_product, precision=precision, output_dtype=output_dtype)
        return cut_product(self, local, x, (kernel,), (self.kernel_spec(require_mesh()),))


def cut_product(
    cut: KernelCut,
    dot: Callable[..., jax.Array],
    x: jax.Array,
    weights: tuple[jax.Array, ...],
    specs: tuple[PartitionSpec, ...],
) -> jax.Array:
    """A dense layer's product on the mesh in force: `dot(x, *weights)` on each device's parts, summed where it must be.

    Args:
      cut: how the kernel may be cut.
      dot: gives one device's part of the output, or its partial sum where the kernel is cut by its inputs.
      x: `[..., d_in]`, the first axis being the batch.
      weights: the kernel, or what it is made of, and whatever else `dot` takes.
      specs: how each of the weights is cut.
    """
    mesh = require_mesh()
    form = cut.form(mesh)
    rows = batch_spec(x.shape, mesh)[:-1]

    def local(x: jax.Array, *weights: jax.Array) -> jax.Array:
        if form == "column":
            # Once, so that the backward pass sums one gradient of x, not the base's and the adapter's apart.
            x = jax.lax.pcast(x, TENSOR, to="varying")
        y = dot(x, *weights)
        return jax.lax.psum(y, TENSOR) if form == "row" else y

    over_in, over_out = (TENSOR if form == "row" else None), (TENSOR if form == "column" else None)
    in_specs, out_spec = (PartitionSpec(*rows, over_in), *specs), PartitionSpec(*rows, over_out)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_spec)(x, *weights)


def require_one_device(kernel: jax.Array) -> None:
    """Raises ValueError if a kernel is seen to lie on a mesh, where none is in force."""
    mesh = mesh_of(kernel)
    if mesh is not None and mesh.size > 1:
        raise ValueError("the model lies on a mesh that is not in force; call it inside `with jax.set_mesh(mesh):`")


class ParallelLinear(nnx.Linear):
    """An `nnx.Linear` that multiplies, on the mesh in force, on each device the part of the kernel that it holds.

    Attributes:
      cut: how `tensor` may cut the kernel; by default not at all.
    """

    cut: KernelCut = KernelCut()

    def __call__(self, inputs: jax.Array, out_sharding: jax.P | None = None) -> jax.Array:
        """x·W + bias, `[..., d_in]` to `[..., d_out]`.

        Raises:
          ValueError: the kernel lies on a mesh that is not in force.
        """
        x, kernel, bias = self.promoted(inputs)
        y = self.cut.dot(x, kernel, self.precision, self.preferred_element_type)
        return y if bias is None else y + bias

    def promoted(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The input, the kernel and the bias in the dtype of the computation."""
        bias = None if self.bias is None else self.bias[...]
        return self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)

    def local_product(self, x: jax.Array) -> LocalProduct:
        """The layer's product on the mesh in force, for `cut_product`."""
        x, kernel, bias = self.promoted(x)
        dot = functools.partial(dense_product, precision=self.precision, output_dtype=self.preferred_element_type)
        return LocalProduct(dot, x, (kernel,), (self.cut.kernel_spec(require_mesh()),), bias)


class Table(nnx.Embed):
    """An `nnx.Embed` that looks up, on the mesh in force, on each device the rows that it holds.

    Attributes:
      units: between how many rows `tensor` may cut the table; None where it may not.
    """

    units: int | None = None

    def __call__(self, inputs: jax.Array, out_sharding: jax.P | None = None) -> jax.Array:
        """The rows of `inputs`, whole numbers `[b, t]`, `[b, t, features]`."""
        if active_mesh() is None:
            return super().__call__(inputs, out_sharding)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        return look_up(table, inputs, self.units)


def look_up(table: jax.Array, ids: jax.Array, units: int | None) -> jax.Array:
    """Rows of a table on the mesh in force, `[b, t]` to `[b, t, d]`: each device looks in the rows that it holds.

    Args:
      table: `[rows, d]`.
      ids: whole numbers `[b, t]`, from 0.
      units: between how many rows `tensor` may cut the table; None where it may not.
    """
    mesh = require_mesh()
    cut = units is not None and units % mesh.shape[TENSOR] == 0

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        if not cut:
            return jnp.take(table, ids, axis=0)
        own = ids - jax.lax.axis_index(TENSOR) * table.shape[0]
        here = (own >= 0) & (own < table.shape[0])
        rows = jnp.take(table, jnp.where(here, own, 0), axis=0)
        return jax.lax.psum(jnp.where(here[..., None], rows, 0), TENSOR)

    rows = batch_spec(ids.shape, mesh)
    in_specs = (PartitionSpec(TENSOR if cut else None, None), PartitionSpec(*rows))
    return jax.shard_map(local, in_specs=in_specs, out_specs=PartitionSpec(*rows, None))(table, ids)


def require_mesh() -> AbstractMesh:
    """The mesh in force.

    Raises:
      ValueError: there is none.
    """
    mesh = active_mesh()
    if mesh is None:
        raise ValueError("no mesh is in force; enter jax.set_mesh(mesh)")
    return mesh
