"""Adapters for plain arrays: Haiku, Equinox, or JAX with a dict of kernels::

    from melora_jax import functional

    kernels = {"layer_0/query": W, ...}                           # each [d_in, d_out], under names of your choice
    adapters = functional.init(kernels, config, key)              # the tree to train with jax.grad and optax
    y = x @ W + functional.apply(x, adapters["layer_0/query"])    # in your forward pass
    kernels = functional.merge(kernels, adapters)

Imports `core` and below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from melora_jax.config import AdapterSpec, MELoRAConfig, Strategy
from melora_jax.core import blocks
from melora_jax.core.dense_view import DenseView, unadaptable, view_of_general
from melora_jax.core.initializers import init_factors, start_key
from melora_jax.core.products.latents import update
from melora_jax.core.products.merged import merged_kernel
from melora_jax.core.products.plan import plan_product, planned_strategy
from melora_jax.core.targeting import NamedModule, require_factors_alone, selection_of
from melora_jax.validation import check_sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one kernel, a pytree whose leaves are its factors.

    Attributes:
      a, b: float32 `[n i r]` and `[n r o]`, with i = d_in/n and o = d_out/n.
      path: the kernel's name, which also selects the stream of dropout masks.
      spec: the adapter's settings at this path.

    >>> adapters = init({"query": jnp.ones((6, 4))}, MELoRAConfig(n=2, targets=["query"]), jax.random.key(0))
    >>> jax.tree.map(jnp.shape, adapters["query"]).b
    (2, 1, 2)
    """

    a: Array
    b: Array
    path: str = dataclasses.field(metadata={"static": True})
    spec: AdapterSpec = dataclasses.field(metadata={"static": True})

    @property
    def strategy(self) -> Strategy:
        """How its products are computed on the platform traced for."""
        return planned_strategy(self.spec)

    @property
    def view(self) -> DenseView:
        """The view of the kernel, which is flat already."""
        return view_of_general((self.a.shape[0] * self.a.shape[1],), (self.b.shape[0] * self.b.shape[2],), (-1,))


def init(kernels: Mapping[str, Any], config: MELoRAConfig, key: Array) -> dict[str, Adapter]:
    """Creates an adapter for each kernel whose name `config` targets; `"all-linear"` targets all with two axes.

    Args:
      kernels: by name, such as a path with "/", arrays `[d_in, d_out]` or anything with a `shape`.
      config: what to adapt. `modules_to_save` must be empty: train other arrays beside the adapters yourself.
      key: a PRNG key for the initial values, into which each adapter folds its name.

    Returns:
      The adapters by name, with float32 factors.

    Raises:
      ValueError: a target, override or exclusion matches nothing, a targeted kernel does not have two axes or sizes
        that n divides, `modules_to_save` is not empty, or `config` trains parameters of the base.

    >>> kernels = {"query": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    >>> adapters = init(kernels, MELoRAConfig(n=2, r=3, targets=["query"]), jax.random.key(0))
    >>> adapters["query"].a.shape, adapters["query"].b.shape
    ((2, 3, 3), (2, 3, 2))
    >>> x = jnp.ones((5, 6))
    >>> y = x @ kernels["query"] + apply(x, adapters["query"])
    >>> bool(jnp.allclose(y, x @ merge(kernels, adapters)["query"]))
    True
    """
    require_factors_alone(config, "melora_jax.functional")
    if config.modules_to_save:
        saved = list(config.modules_to_save)
        raise ValueError(f"modules_to_save={saved} can't be kept in adapters; train these arrays beside them instead")
    named = [NamedModule(tuple(kernel.shape), (path,), len(kernel.shape) == 2) for path, kernel in kernels.items()]
    adapted = selection_of(named, config, "array [d_in, d_out]").adapted
    for module, spec in adapted:
        _check_shape(module.node, spec, module.paths[0])
    return {module.paths[0]: _adapter(module.paths[0], module.node, spec, key) for module, spec in adapted}


def _check_shape(shape: tuple[int, ...], spec: AdapterSpec, path: str) -> None:
    if len(shape) != 2:
        raise unadaptable(path, f"its shape {list(shape)} is not [d_in, d_out]")
    check_sizes(*shape, spec.n, path)


def _adapter(path: str, shape: tuple[int, int], spec: AdapterSpec, key: Array) -> Adapter:
    return Adapter(*init_factors(start_key(key, path), *shape, spec), path, spec)


def apply(x: Float[Array, "... d_in"], adapter: Adapter) -> Float[Array, "... d_out"]:
    """x·ΔW in the dtype of `x`, to be added to x·W. Dropout acts inside `melora_jax.dropout_key`.

    Source: MELoRA (arXiv 2402.17263), equation 3.

    >>> adapters = init({"query": jnp.ones((6, 4))}, MELoRAConfig(n=2, targets=["query"]), jax.random.key(0))
    >>> apply(jnp.ones((5, 6), jnp.bfloat16), adapters["query"]).dtype.name
    'bfloat16'
    """
    plan = plan_product(adapter.spec, adapter.view)
    return update(plan, x, adapter.a, adapter.b, plan.mask(x.shape, adapter.path), x.dtype)


def delta(adapter: Adapter) -> Float[Array, "d_in d_out"]:
    """ΔW `[d_in, d_out]`, float32.

    >>> adapters = init({"query": jnp.ones((6, 4))}, MELoRAConfig(n=2, targets=["query"]), jax.random.key(0))
    >>> delta(adapters["query"]).shape
    (6, 4)
    """
    return blocks.delta(adapter.a, adapter.b, blocks.scale_of(adapter.spec), adapter.spec.mixer)


def merge(kernels: Mapping[str, Array], adapters: Mapping[str, Adapter]) -> dict[str, Array]:
    """The kernels with W + ΔW in place of each adapted W, summed in float32 and rounded to the kernel's dtype.

    Args:
      kernels: as for `init`.
      adapters: from `init`.

    Raises:
      ValueError: an adapter's kernel is missing or has another shape.

    >>> kernels = {"query": jnp.ones((6, 4), jnp.bfloat16)}
    >>> adapters = init(kernels, MELoRAConfig(n=2, targets=["query"]), jax.random.key(0))
    >>> merge(kernels, adapters)["query"].dtype.name
    'bfloat16'
    """
    merged = dict(kernels)
    for path, adapter in adapters.items():
        shape = (adapter.view.d_in, adapter.view.d_out)
        if path not in kernels or tuple(kernels[path].shape) != shape:
            there = list(kernels[path].shape) if path in kernels else "absent"
            raise ValueError(
                f"the adapter of {path} is for a kernel {list(shape)}, which is {there}; pass those of init"
            )
        merged[path] = merged_kernel(adapter.spec, adapter.view, jnp.asarray(kernels[path]), adapter.a, adapter.b)
    return merged
