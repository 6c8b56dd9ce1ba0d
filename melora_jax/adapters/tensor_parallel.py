"""An adapter on one device of a mesh: its mini-adapters beside that device's part of the base's product.

Each mini-adapter owns a slice of the input and a slice of the output, so where n is a multiple of `tensor` a device's
own minis read only inputs that it has and write only outputs that it has: no byte of theirs crosses `tensor`. Other
adapters stay whole on every device and, since they are linear, add their part of the sum; of them only the gradients
of the factors cross.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from melora_jax.config import AdapterSpec
from melora_jax.core.products.cut import Cut, Form
from melora_jax.core.products.latents import update
from melora_jax.core.products.plan import ProductPlan
from melora_jax.core.products.product import adapted_product
from melora_jax.nn.parallel import cut_product, require_mesh
from melora_jax.nn.sharding import TENSOR, batch_spec, mesh_of


def why_whole(spec: AdapterSpec, tensor: int) -> str | None:
    """Why an adapter's factors are not cut along with their kernel; None where they are.

    >>> why_whole(AdapterSpec(n=3, r=(1,) * 3, alpha=(1.0,) * 3), 2)
    'n=3 is not a multiple of tensor=2'
    """
    if spec.mixer != "identity":
        return f"mixer={spec.mixer!r} mixes the minis"
    return f"n={spec.n} is not a multiple of tensor={tensor}" if spec.n % tensor else None


def factor_sharding(kernel: object, spec: AdapterSpec) -> NamedSharding | None:
    """Where an adapter's factors lie, from where its base's kernel does; None where that is on no mesh."""
    mesh = mesh_of(kernel)
    if mesh is None or not isinstance(placed := getattr(kernel, "sharding", None), NamedSharding):
        return None
    return NamedSharding(mesh, factor_spec(placed.spec, spec, mesh))


def factor_spec(kernel: PartitionSpec, spec: AdapterSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an adapter's factors are cut, from how its base's kernel is."""
    along = TENSOR in kernel and why_whole(spec, mesh.shape[TENSOR]) is None
    return PartitionSpec(TENSOR) if along else PartitionSpec()


def whole_notes(adapters: Iterable[tuple[str, object, AdapterSpec]]) -> tuple[str, ...]:
    """What to tell of adapters, (path, kernel, spec), that are not cut over `tensor`: which, and why."""
    notes: dict[str, list[str]] = {}
    for path, kernel, spec in adapters:
        if note := _whole_note(kernel, spec):
            notes.setdefault(note, []).append(path)
    return tuple(f"{', '.join(paths)}: {note}" for note, paths in notes.items())


def _whole_note(kernel: object, spec: AdapterSpec) -> str | None:
    mesh = mesh_of(kernel)
    tensor = 1 if mesh is None else mesh.shape[TENSOR]
    if tensor == 1 or not isinstance(placed := getattr(kernel, "sharding", None), NamedSharding):
        return None
    reason = why_whole(spec, tensor) if TENSOR in placed.spec else f"its kernel is not cut over tensor={tensor}"
    return None if reason is None else f"factors whole on each device, as {reason}"


def cut_of(base: Any, spec: AdapterSpec, mesh: AbstractMesh) -> Cut:
    """How a mesh cuts the product of a layer of ours and its adapter.

    Args:
      base: a `ParallelLinear`, or a `QuantizedLinear` that was one.
      spec: the adapter.
      mesh: the mesh in force.
    """
    form: Form = base.cut.form(mesh)
    minis = form != "whole" and why_whole(spec, mesh.shape[TENSOR]) is None
    return Cut(form, minis, TENSOR, mesh.shape[TENSOR])


def output_on_mesh(
    base: Any, plan: ProductPlan, x: jax.Array, a: jax.Array, b: jax.Array, keep: jax.Array | None
) -> jax.Array:
    """A layer's output with its adapter on the mesh in force, each device's parts of both summed before any is sent.

    Args:
      base: a `ParallelLinear`, or a `QuantizedLinear` that was one.
      plan: of the product, with its cut.
      x: the input `[..., d_in]`.
      a, b: the factors.
      keep: the adapter's dropout mask `[..., d_in]`, drawn for the whole input, so that it does not depend on the mesh.
    """
    mesh, own = require_mesh(), base.local_product(x)
    along = TENSOR if plan.cut is not None and plan.cut.minis else None
    rows = batch_spec(x.shape, mesh)
    operands, specs = [a, b], [PartitionSpec(along), PartitionSpec(along)]
    if keep is not None:
        operands.append(keep)
        specs.append(PartitionSpec(*rows[:-1], along))

    def local(x: jax.Array, *given: jax.Array) -> jax.Array:
        weights, (a, b, *kept) = given[: len(own.weights)], given[len(own.weights) :]
        if plan.strategy == "merged":
            # Their gradients differ from device to device, as the rows do; leaving the shard_map they are summed.
            over = rows[0] or ()
            kernel, a, b = (jax.lax.pcast(array, over, to="varying") if over else array for array in (*weights, a, b))
            return adapted_product(plan, x, kernel, a, b)
        y = own.dot(x, *weights)
        return y + update(plan, x, a, b, kept[0] if kept else None, y.dtype)

    y = cut_product(base.cut, local, own.x, (*own.weights, *operands), (*own.specs, *specs))
    return y if own.bias is None else y + own.bias.astype(y.dtype)
