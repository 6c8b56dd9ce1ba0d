"""How a layer's product with its adapter is computed: what its base allows, and the plan for one input."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from melora_jax.adapters.tensor_parallel import cut_of, why_whole
from melora_jax.config import AdapterSpec
from melora_jax.core.dense_view import DenseView
from melora_jax.core.products.plan import ProductPlan, plan_product
from melora_jax.nn.parallel import ParallelLinear, require_one_device
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.sharding import DATA, FSDP, TENSOR, active_mesh, mesh_of


def may_merge(base: Any, spec: AdapterSpec, kind: str | None, path: str) -> bool:
    """Whether a layer's product may form W + ΔW: where that was asked for, or "auto" loses nothing by it.

    Args:
      base: the layer that has the adapter.
      spec: the adapter.
      kind: the name of a kind of adapter that is not the sum of W and s·A·B; None for others.
      path: for errors.

    Raises:
      ValueError: it was asked for, and the base or the kind does not allow it.

    >>> base = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
    >>> may_merge(base, AdapterSpec(n=2, r=(1, 1), alpha=(1.0, 1.0)), None, "query")
    True
    """
    why_not = f"a {kind} is not the sum of W and s·A·B" if kind else _why_unmergeable(base, spec)
    if spec.strategy == "merged":
        if why_not is not None:
            raise ValueError(f'strategy="merged" at {path or "a layer"}: {why_not}; use strategy="batched" or "auto"')
        return True
    if spec.strategy != "auto" or why_not is not None or spec.dropout or spec.mixer != "identity":
        return False  # with another mixer ΔW is dense
    # A sum that is rounded to less than float32, or a quantised kernel made whole, must be asked for.
    return isinstance(base, nnx.Linear) and _in_float32(base, spec)


def _in_float32(base: nnx.Linear, spec: AdapterSpec) -> bool:
    computed = spec.dtype or base.dtype or base.param_dtype
    return jnp.dtype(computed) == base.param_dtype == jnp.float32


def _why_unmergeable(base: Any, spec: AdapterSpec) -> str | None:
    """Why a layer's kernel and ΔW cannot be summed in a pass; None where they can."""
    if not isinstance(base, nnx.Linear | QuantizedLinear):
        return f"{type(base).__name__} is not a dense layer (nnx.Linear)"
    if isinstance(base, QuantizedLinear):
        mesh = mesh_of(base.codes.get_raw_value())
        return "its quantised kernel lies on a mesh" if mesh is not None and mesh.size > 1 else None
    if base.dot_general is not jax.lax.dot_general:
        return "the layer has a dot_general of its own"
    mesh = mesh_of(base.kernel.get_raw_value())
    if mesh is None or mesh.size == 1:
        return None
    ours = isinstance(base, ParallelLinear)
    return _why_unmergeable_on(mesh.abstract_mesh, base, spec) if ours else "the kernel lies on a mesh"


def _why_unmergeable_on(mesh: AbstractMesh, base: Any, spec: AdapterSpec) -> str | None:
    """Why a layer of ours can't on a mesh: its kernel would need minis that the device does not have."""
    if isinstance(base, QuantizedLinear):
        return "its quantised kernel lies on a mesh"
    whole = None if base.cut.form(mesh) == "whole" else why_whole(spec, mesh.shape[TENSOR])
    return whole and f"its kernel is cut over tensor, its minis are not, as {whole}"


def plan_layer(base: Any, spec: AdapterSpec, view: DenseView, shape: tuple[int, ...], mergeable: bool) -> ProductPlan:
    """The plan of a layer's product for an input, on the mesh in force.

    Args:
      base: the layer that has the adapter.
      spec: the adapter whose factors are multiplied.
      view: how the layer's input and output lie flat.
      shape: of the input.
      mergeable: by `may_merge`.
    """
    ours = isinstance(base, ParallelLinear | QuantizedLinear) and base.cut is not None
    mesh = active_mesh() if ours else None
    tokens = math.prod(view.flat_shape(shape)[:-1])
    if mesh is not None:
        tokens //= mesh.shape[DATA] * mesh.shape[FSDP]
        mergeable = mergeable and _why_unmergeable_on(mesh, base, spec) is None
    return plan_product(
        spec,
        view,
        tokens,
        mergeable=mergeable,
        cut=None if mesh is None else cut_of(base, spec, mesh),
        precision=getattr(base, "precision", None),
        output_dtype=getattr(base, "preferred_element_type", None),
    )


def computes_a_dense_product(base: Any) -> bool:
    """Whether a layer computes x·W + bias and nothing else, so that its kernel can be multiplied in its place."""
    plain = type(base).__call__ in (nnx.Linear.__call__, ParallelLinear.__call__)
    return plain and base.dot_general is jax.lax.dot_general


def kernel_and_bias(base: Any, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """A dense layer's kernel and bias in the dtype of its computation on `x`.

    Raises:
      ValueError: the kernel lies on a mesh that is not in force.
    """
    bias = None if base.bias is None else base.bias[...]
    if isinstance(base, QuantizedLinear):
        return base.kernel, bias
    if isinstance(base, ParallelLinear):
        require_one_device(base.kernel[...])
    _, kernel, bias = base.promote_dtype((x, base.kernel[...], bias), dtype=base.dtype)
    return kernel, bias
