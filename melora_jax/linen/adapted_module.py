"""`AdaptedModule`: a Linen module whose layers add their adapters' outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict, freeze, meta
from flax.core.scope import in_filter

from melora_jax.checkpoints.native_format import AdapterTree, SiteFactors
from melora_jax.config import MELoRAConfig
from melora_jax.core.report import Adaptation
from melora_jax.core.targeting import NamedModule, selects
from melora_jax.linen.interceptor import COLLECTION, AddUpdates
from melora_jax.linen.site import LinenSite
from melora_jax.linen.trace import is_linear
from melora_jax.linen.tree import Flat, Path, flat_from_tree, is_inside, joined, parts, tree_from_flat

# nn.jit caches its traces. Marking them with the config keeps it from reusing those of another config.
_trace_mark = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedModule:
    """A Linen module with adapters, created by `adapt`. It prints as a table of its sites.

    Attributes:
      module: the original module.
      config: the config it was adapted with.
      sites: the adapted layers by path.
      saved: the paths of `modules_to_save`, which are trained whole.
      called: the paths of all modules that the example call reached.
      shapes: the shapes of the arrays in the `"melora"` collection, by path.
      adaptation: the table of sites with parameter counts.

    >>> from melora_jax.linen.adapt import adapt
    >>> model, x = nn.Dense(4), jnp.ones((1, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> config = MELoRAConfig(n=2, targets="all-linear")
    >>> adapted, melora = adapt(nn.Sequential([model]), {"params": {"layers_0": variables["params"]}}, config,
    ...                         jax.random.key(1), x)
    >>> merged = adapted.merge({"params": {"layers_0": variables["params"]}, "melora": melora})
    >>> merged["params"]["layers_0"]["kernel"].shape
    (8, 4)
    """

    module: nn.Module
    config: MELoRAConfig
    sites: Mapping[str, LinenSite]
    saved: tuple[str, ...]
    called: frozenset[str]
    shapes: Mapping[Path, tuple[int, ...]]
    adaptation: Adaptation

    def __str__(self) -> str:
        return str(self.adaptation)

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`module.apply`, with the adapters' outputs added.

        Args:
          variables: the module's collections and `"melora"`.
          args, kwargs: as `module.apply` takes them. Adapter dropout acts inside `melora_jax.dropout_key`.

        Returns:
          What `module.apply` returns.

        Raises:
          ValueError: the `"melora"` collection belongs to another module, `"params"` is mutable, or the call reaches a
            layer that `config` names and the example call of `adapt` did not reach.
        """
        if in_filter(kwargs.get("mutable", False), "params"):
            raise ValueError(
                f"mutable={kwargs['mutable']!r} would write to params, which stay as they are; name the collections to "
                "change, such as mutable=['batch_stats']"
            )
        others, params, factors = self._taken_apart(variables)
        for site in self.sites.values():
            for place in site.places:
                params[(*place[:-1], COLLECTION, place[-1])] = factors.pop(place)
            if site.spec.dropout and site.layer.lifting.sizes:
                params[(*parts(site.path), COLLECTION, "number")] = site.layer.lifting.numbers()
        with _trace_mark(self.config.to_json()), nn.intercept_methods(AddUpdates(self.sites, self._require_known)):
            return self.module.apply({**others, "params": tree_from_flat(params | factors)}, *args, **kwargs)

    def merge(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of the plain module, with W + ΔW summed in float32 and rounded to each kernel's dtype.

        Modules of `modules_to_save` keep the values and the dtype that they have in `"melora"`.

        Raises:
          ValueError: the `"melora"` collection belongs to another module.
        """
        others, params, factors = self._taken_apart(variables)
        for site in self.sites.values():
            place = (*parts(site.path), site.layer.view.kernel_name)
            params[place] = site.merged(params[place], *(factors.pop(factor) for factor in site.places))
        merged = tree_from_flat(params | factors)
        return {**others, "params": freeze(merged) if isinstance(variables["params"], FrozenDict) else merged}

    def adapter_tree(self, melora: Mapping[str, Any], base_model: str | None = None) -> AdapterTree:
        """The collection in the form that is saved, in our format or PEFT's.

        Raises:
          ValueError: the collection belongs to another module, or layers are stacked under one path.
        """
        factors = self._checked(melora)
        for site in self.sites.values():
            if site.layer.lifting.sizes:
                raise ValueError(
                    f"{site.path} is a stack of {site.layer.lifting.copies} layers, and an adapter folder has no "
                    "stacks; save the collection itself with orbax or flax.serialization"
                )
        sites = {}
        for path, site in self.sites.items():
            a, b = (np.asarray(factors.pop(place)) for place in site.places)
            sites[path] = SiteFactors(site.spec, a, b, site.layer.view.lookup)
        saved = {joined(path): np.asarray(meta.unbox(leaf)) for path, leaf in factors.items()}
        return AdapterTree(self.config, sites, saved, base_model)

    def _taken_apart(self, variables: Mapping[str, Any]) -> tuple[dict[str, Any], Flat, Flat]:
        """The other collections, the flat params and the flat, checked adapter collection."""
        for name in ("params", COLLECTION):
            if name not in variables:
                raise ValueError(
                    f"variables holds {sorted(variables)} and no {name!r}; pass {{**variables, 'melora': melora}} with "
                    "the collection that adapt returned"
                )
        others = {name: tree for name, tree in variables.items() if name not in ("params", COLLECTION)}
        return others, flat_from_tree(variables["params"]), self._checked(variables[COLLECTION])

    def _checked(self, melora: Mapping[str, Any]) -> Flat:
        """The flat adapter collection; a ValueError if it belongs to another module."""
        factors = flat_from_tree(melora)
        shapes = {path: jnp.shape(meta.unbox(leaf)) for path, leaf in factors.items()}
        for path in sorted(shapes.keys() | self.shapes.keys()):
            if shapes.get(path) != self.shapes.get(path):
                theirs, ours = (list(at[path]) if path in at else "absent" for at in (shapes, self.shapes))
                raise ValueError(
                    f"the 'melora' collection is for another model or config: {joined(path)} is {theirs} there and "
                    f"{ours} here; pass the collection that adapt returned with this module"
                )
        return factors

    def _require_known(self, module: nn.Module, path: str) -> None:
        """Raises a ValueError for a layer that should have an adapter but was not called in `adapt`."""
        if path in self.called or is_inside(path, self.saved):
            return
        if selects(self.config, NamedModule(module, (path,), is_linear(module))):
            raise ValueError(
                f"{path} is called here but not in the example call of adapt, so it has no adapter; give adapt an "
                f"example that reaches it, or leave it out with exclude={[path]}"
            )
