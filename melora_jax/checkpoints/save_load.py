"""A model's adapters to and from folders: what `surgery` finds, in the files of `interchange` and of PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.adapters.adapt import (
    CONFIG_ATTRIBUTE,
    Adaptation,
    adapt,
    adapters_of,
    config_of,
    describe,
    require_live,
)
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import StartParam
from melora_jax.adapters.plan import plan_sites
from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors, config_of_sites
from melora_jax.checkpoints.fit import beside_factors, require_fit, require_same_factors
from melora_jax.checkpoints.model_card import Provenance, license_in
from melora_jax.checkpoints.native_format import read_adapter, write_adapter
from melora_jax.checkpoints.peft.export import PeftFormat, PeftHost, write_peft
from melora_jax.checkpoints.peft.reader import read_peft
from melora_jax.config import MELoRAConfig
from melora_jax.core.spectrum import singular_values
from melora_jax.models.hub.names import torch_from_flax
from melora_jax.nn.scan_layers import is_stacked, unstacked
from melora_jax.nn.sharding import put
from melora_jax.nn.tree import path_of, walk


def save_adapter(
    model: nnx.Module,
    folder: str | Path,
    *,
    scores: Mapping[str, float] | None = None,
    data: str | None = None,
) -> Path:
    """Writes a model's factors and saved modules, a few MB whatever the base's size, and a model card.

    Args:
      model: an adapted model.
      folder: made if absent; an existing adapter there is replaced as a whole, or kept if writing fails.
      scores: what was measured, name to value, for the card. A README.md that a person wrote is kept instead.
      data: what it was trained on, in words or by name, for the card.

    Raises:
      ValueError: the model was not adapted, or a training step has deleted its arrays.
      OSError: the disk refuses.
    """
    return write_adapter(adapter_tree(model), folder, provenance_of(model, scores, data))


def provenance_of(model: nnx.Module, scores: Mapping[str, float] | None = None, data: str | None = None) -> Provenance:
    """What a model card says of where a model's adapter comes from; the licence is that in the base's own card."""
    return Provenance(scores, data, license_in(getattr(model, "folder", "")))


def adapter_tree(model: nnx.Module) -> AdapterTree:
    """A model's trained arrays and their settings, on the host."""
    config = config_of(model)
    require_live(model)
    model = unstacked(model, (nnx.Param, StartParam))
    sites = {path: _site(layer) for path, layer in adapters_of(model).items()}
    return AdapterTree(
        config=config,
        sites=sites,
        saved={path: np.asarray(variable[...]) for path, variable in beside_factors(model).items()},
        base_model=getattr(model, "name_or_path", None) or None,
        task=getattr(model, "task", None),
    )


def _site(layer: MELoRADense) -> SiteFactors:
    """A layer's arrays on the host."""
    arrays = {name: np.asarray(variable[...]) for name, variable in layer.arrays.items()}
    return SiteFactors(layer.spec, arrays.pop("a"), arrays.pop("b"), layer.view.lookup, arrays)


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
    return _put(model, read_adapter(folder), folder)


def warm_start(model: nnx.Module, folder: str | Path) -> Adaptation:
    """Starts the factors of an adapted model from a saved adapter; its head, of another task, is left out.

    LoRA's authors start MRPC, RTE and STS-B from an adapter trained on MNLI (arXiv 2106.09685, section 5.2).

    Args:
      model: an adapted model.
      folder: what `save_adapter` wrote, of a model of the same shape.

    Returns:
      The model's `Adaptation`.

    Raises:
      FileNotFoundError: no adapter there.
      ValueError: a model without adapters or with stacked layers; an adapter of other sites, sizes or scales. The model
        is left as it was.
    """
    config_of(model)
    if is_stacked(model):
        raise ValueError("the model's layers are stacked; start it from an adapter before, or unstack_layers(model)")
    tree = read_adapter(folder)
    require_same_factors(model, tree, folder)
    for path, layer in adapters_of(model).items():
        site = tree.sites[path]
        for name, start in {"a": site.a, "b": site.b, **site.extras}.items():
            variable = getattr(layer, name)
            variable.set_value(put(jnp.asarray(start, jnp.float32), variable.get_value().sharding))
    return describe(model)


def import_peft(model: nnx.Module, folder: str | Path) -> Adaptation:
    """Puts an adapter in PEFT's format into `model`, to go on training or to merge; the inverse of `export_peft`.

    A LoRA becomes n=1 adapters, rsLoRA, rank_pattern, alpha_pattern and modules_to_save included. One that is
    block-diagonal becomes the MELoRA that it is; what `export_peft` wrote comes back bit for bit. The MELoRA
    authors' own files are read too, their adapter_model.bin without running anything that is in it.

    Args:
      model: the plain base model.
      folder: adapter_config.json, and adapter_model.safetensors or adapter_model.bin.

    Returns:
      The model's `Adaptation`.

    Raises:
      FileNotFoundError: no adapter there.
      ValueError: a setting without counterpart, damaged files, or an adapter for another model. The model is left as it
        was.
    """
    return _put(model, _with_short_names(model, read_peft(folder)), folder)


def _put(model: nnx.Module, tree: AdapterTree, folder: str | Path) -> Adaptation:
    if is_stacked(model):
        raise ValueError("the model's layers are stacked; load an adapter before, or call unstack_layers(model) first")
    require_fit(model, tree, folder)
    if getattr(model, CONFIG_ATTRIBUTE, None) is None:
        adapt(model, tree.config, rngs=nnx.Rngs(0))
    for path, layer in adapters_of(model).items():
        site = tree.sites[path]
        for name, array in {"a": site.a, "b": site.b, **site.extras}.items():
            getattr(layer, name).set_value(jnp.asarray(array, jnp.float32))
    for path, variable in beside_factors(model).items():
        variable.set_value(jnp.asarray(tree.saved[path], variable.dtype))
    return describe(model)


def _with_short_names(model: nnx.Module, tree: AdapterTree) -> AdapterTree:
    """The tree with the sites' last names as targets, if they name the same layers of `model` and no others."""
    leaves = tuple(sorted({path.rpartition("/")[2] for path in tree.sites}))
    specs = {path: site.spec for path, site in tree.sites.items()}
    by_path = config_of_sites(specs, tree.config.modules_to_save, tree.config.bias)
    if tree.config != by_path or _sites_named(model, tree.config) != set(tree.sites):
        return tree
    config = dataclasses.replace(tree.config, targets=leaves)
    return dataclasses.replace(tree, config=config) if _sites_named(model, config) == set(tree.sites) else tree


def _sites_named(model: nnx.Module, config: MELoRAConfig) -> set[str]:
    try:
        return set(plan_sites(model, config).sites)
    except ValueError:
        return set()  # `require_fit` says why


def export_peft(
    model: nnx.Module,
    folder: str | Path,
    format: PeftFormat = "lora",
    *,
    scores: Mapping[str, float] | None = None,
    data: str | None = None,
) -> Path:
    """Writes the adapter in PEFT's format: exact, and read by PEFT, vLLM, SGLang and llama.cpp's converter.

    Args:
      model: an adapted model whose module paths are the Hugging Face names.
      folder: replaced as a whole, or kept if writing fails.
      format: `"lora"`, plain LoRA of rank Σ r_k, or `"bdlora"`, which PEFT alone reads: no zeros in A.
      scores: what was measured, name to value, for the model card.
      data: what it was trained on, in words or by name, for the model card.

    Raises:
      ValueError: no adapters, an unknown format, or adapters that `"bdlora"` can't hold.

    The plain file holds the zeros off the diagonal too, n times the adapter's own size.
    """
    tree = adapter_tree(model)
    return write_peft(tree, peft_host(model, tree), folder, format, provenance_of(model, scores, data))


def peft_host(model: nnx.Module, tree: AdapterTree) -> PeftHost:
    """What an export of `tree` must know of its model, which may be plain or adapted, and without values."""
    model = unstacked(model, nnx.Nothing())
    dense = [path_of(path) for path, node in walk(model) if isinstance(node, nnx.Module) and _is_dense(node)]
    saved = dict(torch_from_flax(_path_in_peft(path, tree), value) for path, value in tree.saved.items())
    tied = _tied_embedding(model)
    if tied is not None and f"{tied}/embedding" in tree.saved:
        # PEFT looks for both ends of the tie
        saved["lm_head.weight"] = tree.saved[f"{tied}/embedding"]
    return PeftHost(
        saved=saved,
        other_modules=set(dense) - {f"{path}/base" for path in tree.sites} - set(tree.sites),
        tied=tied is not None and (tied in tree.sites or f"{tied}/embedding" in tree.saved),
    )


def _path_in_peft(path: str, tree: AdapterTree) -> str:
    """PEFT too puts the adapted layer inside of the adapter, and names its bias so."""
    site, _, name = path.rpartition("/")
    return f"{site}/base_layer/{name}" if site in tree.sites else path


def _tied_embedding(model: nnx.Module) -> str | None:
    """The path of a language model's embedding that is its output layer too."""
    output = getattr(model, "output_embeddings", None)
    for path, node in walk(model):
        if node is output and isinstance(getattr(node, "base", node), nnx.Embed):
            return path_of(path)
    return None


def spectra(model: nnx.Module) -> dict[str, np.ndarray]:
    """The singular values of every site's ΔW, float64, largest first, by site path; of DoRA before its normalisation.

    Raises:
      ValueError: the model was not adapted.
    """
    config_of(model)
    sites = adapters_of(unstacked(model, (nnx.Param, StartParam)))
    return {path: singular_values(*map(np.asarray, layer.packed_factors())) for path, layer in sites.items()}


def _is_dense(node: nnx.Module) -> bool:
    return isinstance(node, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Embed)
