"""Checks that an adapter fits a model, before anything is changed; errors name path and shape."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flax import nnx

from melora_jax.adapters.adapt import CONFIG_ATTRIBUTE, adapters_of, config_of
from melora_jax.adapters.kinds import kind_of
from melora_jax.adapters.params import MELoRAParam
from melora_jax.adapters.plan import plan_sites
from melora_jax.checkpoints.adapter_state import AdapterTree
from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.core.dense_view import DenseView
from melora_jax.nn.layer_view import view_of
from melora_jax.nn.tree import path_of, walk, without_base


def require_fit(model: nnx.Module, tree: AdapterTree, folder: str | Path) -> None:
    """Raises ValueError unless the adapter read from `folder` is one for `model`, plain or adapted with its config."""
    if getattr(model, CONFIG_ATTRIBUTE, None) is None:
        _require_arrays(tree, *_needs_of_plain(model, tree.config, folder), folder)
    else:
        _require_same_config(model, tree, folder)
        _require_arrays(tree, *_needs_of_adapted(model), folder)


def require_same_factors(model: nnx.Module, tree: AdapterTree, folder: str | Path) -> None:
    """Raises ValueError unless the factors read from `folder` are those of an adapted model: sites, sizes, scales."""
    here, there = adapters_of(model), tree.sites
    if stray := sorted(here.keys() ^ there.keys()):
        where, other = ("the model", "the adapter") if stray[0] in here else ("the adapter", "the model")
        raise ValueError(
            f"the factors in {folder} do not fit: {where} has {stray[0]} and {other} has not; adapt the same targets"
        )
    for path, layer in here.items():
        spec, given = layer.spec, there[path].spec
        for name in ("n", "r", "mixer", "variant", "scales"):
            ours, theirs = getattr(spec, name), getattr(given, name)
            if ours != theirs:
                raise ValueError(
                    f"the factors in {folder} do not fit: at {path} their {name} is {theirs}, here it is {ours}; adapt "
                    "with the same settings"
                )
        shapes = _factor_shapes(path, spec, layer.view)
        if spec.kind != given.kind:
            raise ValueError(
                f"the factors in {folder} do not fit: at {path} their init is {given.init!r}, here it is {spec.init!r},"
                " and PiSSA's are differences from its start; adapt with the same init"
            )
        for name, factor in (("a", there[path].a), ("b", there[path].b)):
            if shapes[f"{path}/{name}"] != factor.shape:
                raise ValueError(
                    f"the factors in {folder} are of a model of another width: {path}/{name} is {list(factor.shape)} "
                    f"there and {list(shapes[f'{path}/{name}'])} here; start from an adapter of this base model"
                )


def beside_factors(model: nnx.Module) -> dict[str, nnx.Variable]:
    """What is trained beside the factors, of saved modules and of the base, by their path in the host."""
    sites = tuple(adapters_of(model))
    found = {path_of(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, _is_beside))}
    return {without_base(path, sites): variable for path, variable in found.items()}


def _is_beside(path: object, variable: object) -> bool:
    return isinstance(variable, nnx.Param) and not isinstance(variable, MELoRAParam)


_Needs = tuple[dict[str, AdapterSpec], dict[str, tuple[int, ...]]]


def _needs_of_plain(model: nnx.Module, config: MELoRAConfig, folder: str | Path) -> _Needs:
    """The spec of each site, and the shape of each array, that an adapter of `config` has for this plain model."""
    try:
        plan = plan_sites(model, config)
    except ValueError as error:
        raise ValueError(f"the adapter in {folder} does not fit this model: {error}") from None
    nodes: dict[str, Any] = {path_of(path): node for path, node in walk(model)}
    shapes = {path: nodes[path].shape for path in plan.saved | plan.base}
    for path, spec in plan.sites.items():
        shapes |= _factor_shapes(path, spec, view_of(nodes[path]))
    return dict(plan.sites), shapes


def _needs_of_adapted(model: nnx.Module) -> _Needs:
    shapes = {path: variable.shape for path, variable in beside_factors(model).items()}
    for path, layer in adapters_of(model).items():
        shapes |= _factor_shapes(path, layer.spec, layer.view)
    return {path: layer.spec for path, layer in adapters_of(model).items()}, shapes


def _factor_shapes(path: str, spec: AdapterSpec, view: DenseView) -> dict[str, tuple[int, ...]]:
    shapes = kind_of(spec).shapes(spec, view.d_in, view.d_out)
    return {f"{path}/{name}": shape for name, shape in shapes.items()}


def _require_same_config(model: nnx.Module, tree: AdapterTree, folder: str | Path) -> None:
    here = config_of(model)
    if here != tree.config:
        fields = [field.name for field in dataclasses.fields(MELoRAConfig)]
        keys = [key for key in fields if getattr(here, key) != getattr(tree.config, key)]
        there = ", ".join(f"{key}={getattr(tree.config, key)!r} (the model: {getattr(here, key)!r})" for key in keys)
        raise ValueError(f"the adapter in {folder} was made with {there}; load it into melora_jax.unwrap(model)")


def _require_arrays(
    tree: AdapterTree, specs: dict[str, AdapterSpec], shapes: dict[str, tuple[int, ...]], folder: str | Path
) -> None:
    saved = {key: value.shape for key, value in tree.tensors().items()}
    for key in sorted(shapes.keys() | saved.keys()):
        if shapes.get(key) != saved.get(key):
            ours, theirs = (list(at[key]) if key in at else "absent" for at in (shapes, saved))
            raise ValueError(
                f"the adapter in {folder} is for another model: {key} is {theirs} there and {ours} in this model; load "
                "the base it was trained on, with the same task and number of labels"
            )
    for path, spec in specs.items():
        listed = tree.sites[path].spec if path in tree.sites else "nothing"
        if spec != listed:
            raise ValueError(
                f"the adapter in {folder} contradicts itself: its config gives {path} {spec}, its list of sites "
                f"{listed}; save the adapter again"
            )
