"""Dense layers and tables that may be cut over a mesh: one `jax.shard_map` with no collective but the layer's own.

A kernel cut over `tensor` by its outputs (column-parallel) gives cut outputs and needs nothing; one cut by its inputs
(row-parallel) takes cut inputs and sums its partial outputs, once. Kernels cut over `fsdp` are gathered on the way in.
XLA's partitioner, left to choose, has been seen to give wrong products on meshes of three axes; here it has no choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from melora_jax.nn.sharding import TENSOR, active_mesh, batch_spec, mesh_of

Form = Literal["column", "row", "whole"]


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a device adds to its part of a product, before partial sums are summed.

    Attributes:
      add: `(y, x, *operands) -> y` on one device's parts.
      operands: further arrays.
      specs: how each of them is cut.
    """

    add: Callable[..., jax.Array]
    operands: tuple[jax.Array, ...]
    specs: tuple[PartitionSpec, ...]


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

    def dot(self, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        """x·kernel, cut where a mesh is in force.

        Args:
          x: `[..., d_in]`, the first axis being the batch.
          kernel: `[d_in, d_out]`.
          **options: of `jax.lax.dot_general`.

        Raises:
          ValueError: the kernel is seen to lie on a mesh that is not in force: XLA would be left to partition.
        """
        if active_mesh() is None:
            _require_one_device(kernel)
            return dense_dot(x, kernel, **options)
        return self.product(x, kernel, **options)

    def product(self, x: jax.Array, kernel: jax.Array, beside: Beside | None = None, **options: Any) -> jax.Array:
        """x·kernel, plus what stands beside it, on the mesh in force."""
        local = functools.partial(dense_dot, **options)
        return self.product_by(local, x, (kernel,), (self.kernel_spec(require_mesh()),), beside)

    def product_by(
        self,
        dot: Callable[..., jax.Array],
        x: jax.Array,
        weights: tuple[jax.Array, ...],
        specs: tuple[PartitionSpec, ...],
        beside: Beside | None = None,
    ) -> jax.Array:
        """The same for a kernel that is made of `weights`, cut as `specs` say: `dot(x, *weights)` on one's parts."""
        mesh = require_mesh()
        form = self.form(mesh)
        rows = batch_spec(x.shape, mesh)[:-1]
        extra = Beside(lambda y, x: y, (), ()) if beside is None else beside

        def local(x: jax.Array, *operands: jax.Array) -> jax.Array:
            if form == "column":
                # Once, so that the backward pass sums one gradient of x, not the base's and the adapter's apart.
                x = jax.lax.pcast(x, TENSOR, to="varying")
            y = dot(x, *operands[: len(weights)])
            y = extra.add(y, x, *operands[len(weights) :])
            return jax.lax.psum(y, TENSOR) if form == "row" else y

        over_in, over_out = (TENSOR if form == "row" else None), (TENSOR if form == "column" else None)
        return jax.shard_map(
            local,
            in_specs=(PartitionSpec(*rows, over_in), *specs, *extra.specs),
            out_specs=PartitionSpec(*rows, over_out),
        )(x, *weights, *extra.operands)


def dense_dot(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """x·kernel over the last axis of x, with the options of `jax.lax.dot_general`."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)


def _require_one_device(kernel: jax.Array) -> None:
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
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        y = self.cut.dot(x, kernel, precision=self.precision, preferred_element_type=self.preferred_element_type)
        return y if bias is None else y + bias


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
