"""Adapters for kernels that no Flax module holds: Haiku, Equinox, or plain JAX with a dict of arrays.

kernels = {"layer_0/query": W, ...}                     # [d_in, d_out] each, under names of your own
adapters = raw.init(kernels, config, key)               # the tree to train, by jax.grad and optax
y = x @ W + raw.apply(x, adapters["layer_0/query"])     # in your forward pass
kernels = raw.merge(kernels, adapters)
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
from melora_jax.core.adapter_update import merged_kernel, update_of
from melora_jax.core.dense_view import DenseView, unadaptable, view_of_general
from melora_jax.core.platform import platform
from melora_jax.core.products.plan import choose_strategy
from melora_jax.core.targeting import NamedModule, require_factors_alone, require_patterns, select, spec_of
from melora_jax.validation import check_sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one kernel, a pytree whose leaves are the factors: a `[n i r]` and b `[n r o]`, float32."""

    a: Array
    b: Array
    path: str = dataclasses.field(metadata={"static": True})
    spec: AdapterSpec = dataclasses.field(metadata={"static": True})
    strategy: Strategy = dataclasses.field(metadata={"static": True})

    @property
    def view(self) -> DenseView:
        """How the kernel lies flat: as it is."""
        return view_of_general((self.a.shape[0] * self.a.shape[1],), (self.b.shape[0] * self.b.shape[2],), (-1,))


def init(kernels: Mapping[str, Any], config: MELoRAConfig, key: Array) -> dict[str, Adapter]:
    """An adapter for each kernel whose name `config` targets; `"all-linear"` is all of two axes.

    Args:
      kernels: `[d_in, d_out]` arrays, or anything with a `shape`, by path with "/" (or another name).
      config: what to adapt. `modules_to_save` must be empty: what is trained whole is the caller's.
      key: source of the start values. An adapter folds in its path.

    Raises:
      ValueError: a target, override or exclusion matches nothing, a kernel has not two axes, n does not divide it,
        `modules_to_save` is not empty, or `config` trains the base's own parameters.

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
    kept = select(named, named, config, "array [d_in, d_out]")
    require_patterns(config, kept)
    specs = {chosen.paths[0]: _checked_spec(chosen, config) for chosen in kept}
    return {path: _adapter(path, kernels[path].shape, spec, key) for path, spec in specs.items()}


def _checked_spec(chosen: NamedModule, config: MELoRAConfig) -> AdapterSpec:
    path, spec = chosen.paths[0], spec_of(chosen, config)
    if len(chosen.node) != 2:
        raise unadaptable(path, f"its shape {list(chosen.node)} is not [d_in, d_out]")
    d_in, d_out = chosen.node
    check_sizes(d_in, d_out, spec.n, path)
    return spec


def _adapter(path: str, shape: tuple[int, int], spec: AdapterSpec, key: Array) -> Adapter:
    if spec.strategy == "merged":
        raise ValueError(f'strategy="merged" at {path} is for NNX models, not for bare arrays; use "batched" or "auto"')
    strategy = choose_strategy(spec.strategy, spec.n * max(spec.r), platform())
    return Adapter(*blocks.init_factors(blocks.start_key(key, path), *shape, spec), path, spec, strategy)


def apply(x: Float[Array, "... d_in"], adapter: Adapter) -> Float[Array, "... d_out"]:
    """x·ΔW in the dtype of `x`, to be added to x·W; with dropout inside of `melora_jax.dropout_key`."""
    return update_of(adapter, adapter.view, x, x, adapter.a, adapter.b)


def delta(adapter: Adapter) -> Float[Array, "d_in d_out"]:
    """ΔW, float32."""
    return blocks.delta(adapter.a, adapter.b, blocks.scale_of(adapter.spec), adapter.spec.mixer)


def merge(kernels: Mapping[str, Array], adapters: Mapping[str, Adapter]) -> dict[str, Array]:
    """The kernels with W + ΔW in place of each adapted one, summed in float32 and rounded to its dtype.

    Raises:
      ValueError: an adapter without its kernel, or of another shape.
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
