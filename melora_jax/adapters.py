"""A model's adapters to and from folders: what `surgery` finds, in the files of `interchange`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.graph import path_of, walk
from melora_jax.interchange import AdapterTree, SiteFactors, read_adapter, write_adapter, write_peft
from melora_jax.layers import MELoRAParam
from melora_jax.matching import plan_sites
from melora_jax.models.families import torch_from_flax
from melora_jax.spectrum import singular_values
from melora_jax.stacking import is_stacked, unstacked
from melora_jax.surgery import CONFIG_ATTRIBUTE, Adaptation, adapt, adapters_of, config_of, describe, require_live
from melora_jax.views import DenseView, view_of


def save_adapter(model: nnx.Module, folder: str | Path) -> Path:
    """Writes a model's factors and saved modules, a few MB whatever the base's size.

    Args:
      model: an adapted model.
      folder: made if absent; an existing adapter there is replaced as a whole, or kept if writing fails.

    Raises:
      ValueError: the model was not adapted, or a training step has deleted its arrays.
      OSError: the disk refuses.
    """
    return write_adapter(adapter_tree(model), folder)


def adapter_tree(model: nnx.Module) -> AdapterTree:
    """A model's trained arrays and their settings, on the host."""
    config = config_of(model)
    require_live(model)
    model = unstacked(model, nnx.Param)
    sites = {
        path: SiteFactors(layer.spec, np.asarray(layer.a[...]), np.asarray(layer.b[...]), layer.view.lookup)
        for path, layer in adapters_of(model).items()
    }
    return AdapterTree(
        config=config,
        sites=sites,
        saved={path: np.asarray(variable[...]) for path, variable in _head(model).items()},
        base_model=getattr(model, "name_or_path", None),
        task=getattr(model, "task", None),
    )


def _head(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The variables that are trained whole, by path: every `nnx.Param` that is no factor."""
    return {path_of(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, _is_head))}


def _is_head(path: object, variable: object) -> bool:
    return isinstance(variable, nnx.Param) and not isinstance(variable, MELoRAParam)


def load_adapter(model: nnx.Module, folder: str | Path) -> Adaptation:
    """Puts a saved adapter into `model`, adapting it first if it was not.

    Args:
      model: the plain base model, or one adapted with the same config.
      folder: what `save_adapter` wrote.

    Returns:
      The model's `Adaptation`.

    Raises:
      FileNotFoundError: no adapter there.
      ValueError: damaged files, an adapter for another model or config, or a model whose layers are stacked. The model
        is left as it was.
    """
    if is_stacked(model):
        raise ValueError("the model's layers are stacked; load an adapter before, or call unstack_layers(model) first")
    tree = read_adapter(folder)
    if getattr(model, CONFIG_ATTRIBUTE, None) is None:
        _require_fit(tree, *_needs_of_plain(model, tree.config, folder), folder)
        adapt(model, tree.config, rngs=nnx.Rngs(0))
    else:
        _require_same_config(model, tree, folder)
        _require_fit(tree, *_needs_of_adapted(model), folder)
    for path, layer in adapters_of(model).items():
        layer.a.set_value(jnp.asarray(tree.sites[path].a, jnp.float32))
        layer.b.set_value(jnp.asarray(tree.sites[path].b, jnp.float32))
    for path, variable in _head(model).items():
        variable.set_value(jnp.asarray(tree.saved[path], variable.dtype))
    return describe(model)


_Needs = tuple[dict[str, AdapterSpec], dict[str, tuple[int, ...]]]


def _needs_of_plain(model: nnx.Module, config: MELoRAConfig, folder: str | Path) -> _Needs:
    """The spec of each site, and the shape of each array, that an adapter of `config` has for this plain model."""
    try:
        plan = plan_sites(model, config)
    except ValueError as error:
        raise ValueError(f"the adapter in {folder} does not fit this model: {error}") from None
    shapes: dict[str, tuple[int, ...]] = {}
    named: set[int] = set()
    for path, node in walk(model):
        if id(node) in plan.saved_variables - named:
            shapes[path_of(path)] = node.shape
            named.add(id(node))
    for site in plan.sites.values():
        shapes |= _factor_shapes(site.path, site.spec, view_of(site.layer))
    return {site.path: site.spec for site in plan.sites.values()}, shapes


def _needs_of_adapted(model: nnx.Module) -> _Needs:
    shapes = {path: variable.shape for path, variable in _head(model).items()}
    for path, layer in adapters_of(model).items():
        shapes |= _factor_shapes(path, layer.spec, layer.view)
    return {path: layer.spec for path, layer in adapters_of(model).items()}, shapes


def _factor_shapes(path: str, spec: AdapterSpec, view: DenseView) -> dict[str, tuple[int, ...]]:
    n, r = spec.n, max(spec.r)
    return {f"{path}/a": (n, view.d_in // n, r), f"{path}/b": (n, r, view.d_out // n)}


def _require_same_config(model: nnx.Module, tree: AdapterTree, folder: str | Path) -> None:
    here = config_of(model)
    if here != tree.config:
        fields = [field.name for field in dataclasses.fields(MELoRAConfig)]
        keys = [key for key in fields if getattr(here, key) != getattr(tree.config, key)]
        there = ", ".join(f"{key}={getattr(tree.config, key)!r} (the model: {getattr(here, key)!r})" for key in keys)
        raise ValueError(f"the adapter in {folder} was made with {there}; load it into melora_jax.unwrap(model)")


def _require_fit(
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


def export_peft(model: nnx.Module, folder: str | Path, format: Literal["lora"] = "lora") -> Path:
    """Writes the adapter in PEFT's format, as plain LoRA of rank Σ r_k: exact, and read by PEFT and vLLM.

    Args:
      model: an adapted model whose module paths are the Hugging Face names.
      folder: replaced as a whole, or kept if writing fails.
      format: `"lora"`.

    Raises:
      ValueError: no adapters, or an unknown format.

    The file holds the zeros off the diagonal too, n times the adapter's own size.
    """
    if format != "lora":
        raise ValueError(f'format={format!r} is unknown; choose "lora"')
    tree = adapter_tree(model)
    model = unstacked(model, nnx.Nothing())
    plain = [path_of(path) for path, node in walk(model) if isinstance(node, nnx.Module) and _is_dense(node)]
    others = set(plain) - {f"{path}/base" for path in tree.sites}
    saved = dict(torch_from_flax(path, value) for path, value in tree.saved.items())
    tied = _tied_embedding(model)
    if tied is not None and f"{tied}/embedding" in tree.saved:
        # PEFT looks for both ends of the tie
        saved["lm_head.weight"] = tree.saved[f"{tied}/embedding"]
    touched = tied is not None and (tied in tree.sites or f"{tied}/embedding" in tree.saved)
    return write_peft(tree, saved, folder, others, tied=touched)


def _tied_embedding(model: nnx.Module) -> str | None:
    """The path of a language model's embedding that is its output layer too."""
    output = getattr(model, "output_embeddings", None)
    for path, node in walk(model):
        if node is output and isinstance(getattr(node, "base", node), nnx.Embed):
            return path_of(path)
    return None


def spectra(model: nnx.Module) -> dict[str, np.ndarray]:
    """The singular values of every site's ΔW, float64, largest first, by site path.

    Raises:
      ValueError: the model was not adapted.
    """
    config_of(model)
    sites = adapters_of(unstacked(model, nnx.Param))
    return {path: singular_values(*map(np.asarray, layer.packed_factors())) for path, layer in sites.items()}


def _is_dense(node: nnx.Module) -> bool:
    return isinstance(node, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Embed)
