"""An adapter on one device of a mesh: its mini-adapters beside that device's part of the base's product.

Each mini-adapter owns a slice of the input and a slice of the output, so where n is a multiple of `tensor` a device's
own minis read only inputs that it has and write only outputs that it has: no byte of theirs crosses `tensor`. Other
adapters stay whole on every device and, since they are linear, add their part of the sum; of them only the gradients
of the factors cross.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from melora_jax.config import AdapterSpec, Strategy
from melora_jax.core import blocks
from melora_jax.core.dropout import drop, keep_mask
from melora_jax.core.products.device_part import at_own_part, own_part
from melora_jax.nn.parallel import Beside, Form
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.sharding import TENSOR, batch_spec, mesh_of


def why_whole(spec: AdapterSpec, tensor: int) -> str | None:
    """Why an adapter's factors are not cut along with their kernel; None where they are.

    >>> why_whole(AdapterSpec(n=3, r=(1,) * 3, alpha=(1.0,) * 3), 2)
    'n=3 is no multiple of tensor=2'
    """
    if spec.mixer != "identity":
        return f"mixer={spec.mixer!r} mixes the minis"
    return f"n={spec.n} is no multiple of tensor={tensor}" if spec.n % tensor else None


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


def product_with_adapter(
    base: Any,
    mesh: AbstractMesh,
    x: jax.Array,
    factors_for: Callable[[Any], tuple[jax.Array, jax.Array]],
    scale: np.ndarray,
    spec: AdapterSpec,
    strategy: Strategy,
    path: str,
) -> jax.Array:
    """A dense layer's output plus its adapter's, each device's parts of both summed before anything is sent.

    Args:
      base: a `ParallelLinear`, or one of these quantised.
      mesh: the mesh in force.
      x: its input `[..., d_in]`.
      factors_for: A and B in the dtype that goes with an output's.
      scale, spec, strategy, path: as for `beside_base`.
    """
    form: Form = base.cut.form(mesh)
    if isinstance(base, QuantizedLinear):
        like = jax.ShapeDtypeStruct((*x.shape[:-1], base.out_features), base.dtype)
        return base.on_mesh(x, beside_base(form, mesh, x, factors_for(like), scale, spec, strategy, path))
    bias = None if base.bias is None else base.bias[...]
    x, kernel, bias = base.promote_dtype((x, base.kernel[...], bias), dtype=base.dtype)
    output = functools.partial(jnp.matmul, preferred_element_type=base.preferred_element_type)
    factors = factors_for(jax.eval_shape(output, x, kernel))
    beside = beside_base(form, mesh, x, factors, scale, spec, strategy, path)
    options = {"precision": base.precision, "preferred_element_type": base.preferred_element_type}
    y = base.cut.product(x, kernel, beside, **options)
    return y if bias is None else y + bias


def beside_base(
    form: Form,
    mesh: AbstractMesh,
    x: jax.Array,
    factors: tuple[jax.Array, jax.Array],
    scale: np.ndarray,
    spec: AdapterSpec,
    strategy: Strategy,
    path: str,
) -> Beside:
    """What the adapter adds on each device.

    Args:
      form: how the base's kernel is cut.
      mesh: the mesh in force.
      x: the layer's input `[..., d_in]`, of which the shape is used and, for the dropout mask, nothing else.
      factors: A and B in the dtype of the computation.
      scale: s_k, [n r].
      spec: the adapter.
      strategy: how its product is computed.
      path: of its dropout.
    """
    cut = form != "whole" and why_whole(spec, mesh.shape[TENSOR]) is None

    def add(y: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array, *keep: jax.Array) -> jax.Array:
        x = own_part(x, TENSOR) if cut and form == "column" else x
        x = drop(x.astype(a.dtype), keep[0], spec.dropout) if keep else x.astype(a.dtype)
        x = at_own_part(x, TENSOR) if form == "row" and not cut else x
        update = blocks.apply(x, a, b, scale, spec.mixer, strategy)
        if form == "row" and cut:
            update = at_own_part(update, TENSOR)
        elif form == "column" and not cut:
            update = own_part(update, TENSOR)
        return y + update.astype(y.dtype)

    along = PartitionSpec(TENSOR) if cut else PartitionSpec()
    operands, specs = (*factors, jnp.asarray(scale)), (along, along, along)
    # Drawn out here, over the whole input: which device holds what does not change a mask.
    keep = keep_mask(x.shape, spec.dropout, path)
    if keep is None:
        return Beside(add, operands, specs)
    own = TENSOR if cut or form == "row" else None
    return Beside(add, (*operands, keep), (*specs, PartitionSpec(*batch_spec(x.shape, mesh)[:-1], own)))
