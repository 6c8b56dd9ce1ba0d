"""`adapt`: finds the layers of a Linen model that a config names and creates their adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.core.dense_view import unadaptable
from melora_jax.core.report import Adaptation
from melora_jax.core.targeting import NamedModule, require_factors_alone, selection_of
from melora_jax.linen.adapted_module import AdaptedModule
from melora_jax.linen.site import LinenSite
from melora_jax.linen.trace import called_modules
from melora_jax.linen.tree import flat_from_tree, is_inside, joined, size_of, tree_from_flat
from melora_jax.validation import check_sizes


def adapt(
    module: nn.Module, variables: Mapping[str, Any], config: MELoRAConfig, key: jax.Array, *args: Any, **kwargs: Any
) -> tuple[AdaptedModule, dict[str, Any]]:
    """Finds the layers of a Linen model that `config` names and creates their adapters.

    Args:
      module: any Linen module.
      variables: its collections, `{"params": ...}` and whatever else its call needs. They are only read; without
        `modules_to_save`, `jax.ShapeDtypeStruct`s suffice.
      config: what to adapt. The parameters of `modules_to_save` are copied into the adapters' collection, in float32.
      key: a PRNG key for the initial values. Each site folds in its path, so that its values do not depend on the other
        sites.
      args, kwargs: an example call, as `module.apply` takes it after the variables (with `method=` and `rngs=`). It is
        traced, not computed. `config` can only name layers that it reaches.

    Returns:
      `(adapted, melora)`: the adapted module, and its `"melora"` collection, which is the tree to train: factors
      `[n i r]` and `[n r o]`, float32.

    Raises:
      ValueError: a target, override, exclusion or module to save matches nothing, or a matched module can't be adapted
        or has sizes that n does not divide. The message names the path and the remedy.

    >>> model, x = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(4)]), jnp.ones((1, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> config = MELoRAConfig(n=2, r=1, targets="all-linear")
    >>> adapted, melora = adapt(model, variables, config, jax.random.key(1), x)
    >>> print(adapted)
    site      d_in  d_out  n  r  rank  parameters  strategy
    layers_0     8      6  2  1     2          14  packed
    layers_2     6      4  2  1     2          10  packed
    adapters 24 + head 0 = 24 trainable (22.64 %), 82 frozen
    >>> adapted.apply({**variables, "melora": melora}, x).shape
    (1, 4)
    """
    require_factors_alone(config, "melora_jax.linen")
    if "params" not in variables:
        raise ValueError(f"variables holds {sorted(variables)} and no 'params'; pass {{'params': params}}")
    called = called_modules(module, variables, args, {"rngs": {"params": key}, **kwargs})
    modules = [NamedModule(found, (path,), found.linear) for path, found in called.items()]
    selected = selection_of(modules, config, "Dense, DenseGeneral or Einsum")
    saved = tuple(module.paths[0] for module in selected.saved)
    sites = {module.paths[0]: _planned(module, spec) for module, spec in selected.adapted}
    params = flat_from_tree(variables["params"])
    inside = {path: leaf for path, leaf in params.items() if is_inside(joined(path), saved) and jax.tree.leaves(leaf)}
    head = {path: jax.tree.map(_as_float32, leaf) for path, leaf in inside.items()}
    melora = head | {place: factor for site in sites.values() for place, factor in site.init(key).items()}
    shapes = {path: jnp.shape(meta.unbox(leaf)) for path, leaf in melora.items()}
    adaptation = _adaptation(config, sites.values(), size_of(params), size_of(head))
    return AdaptedModule(module, config, sites, saved, frozenset(called), shapes, adaptation), tree_from_flat(melora)


def _planned(module: NamedModule, spec: AdapterSpec) -> LinenSite:
    path, layer = module.paths[0], module.node.layer
    if layer is None:
        raise unadaptable(path, module.node.reason)
    check_sizes(layer.view.d_in, layer.view.d_out, spec.n, path)
    return LinenSite(path, spec, layer)


def _as_float32(value: jax.Array) -> jax.Array:
    """A copy, so that a step may donate it without deleting params; narrower floats become float32."""
    return jnp.array(value, jnp.float32 if jnp.issubdtype(value.dtype, jnp.floating) else value.dtype)


def _adaptation(config: MELoRAConfig, sites: Iterable[LinenSite], base: int, head: int) -> Adaptation:
    rows = tuple(site.row() for site in sites)
    return Adaptation(rows, sum(row.parameters for row in rows), head, base - head, tuple(config.modules_to_save))
