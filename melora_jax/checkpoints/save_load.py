"""Saves a model's adapters to folders and loads them, in our own format and in PEFT's."""

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
    """Writes the adapters, the modules of `modules_to_save` and a model card; the base is not written.

    Args:
      model: an adapted model.
      folder: created if absent. An adapter that it holds is replaced as a whole, or kept if writing fails. A README.md
        written by a person is kept.
      scores: for the model card, measured values by name.
      data: for the model card, the name or a description of the training data.

    Returns:
      The folder.

    Raises:
      ValueError: the model was not adapted, or a training step has deleted its arrays.
      OSError: a file can't be written.

    >>> import tempfile
    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> _ = adapt(model, MELoRAConfig(n=2, targets="all-linear"), rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = save_adapter(model, f"{folder}/adapter", scores={"accuracy": 0.87})
    ...     load_adapter(nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(1))), written).sites[0].path
    'layers/0'
    """
    return write_adapter(adapter_tree(model), folder, provenance_of(model, scores, data))


def provenance_of(model: nnx.Module, scores: Mapping[str, float] | None = None, data: str | None = None) -> Provenance:
    """What a model card says about the origin of an adapter. The licence is the one in the base's own card."""
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
    """Loads an adapter from `save_adapter` into `model`, in place; a plain model is adapted first.

    Args:
      model: the plain base model, or one that was adapted with the same config.
      folder: written by `save_adapter`.

    Returns:
      The model's `Adaptation`, a table of its sites.

    Raises:
      FileNotFoundError: the folder holds no adapter.
      ValueError: files are damaged, the adapter is for another model or config, or the model's layers are stacked. The
        model is left unchanged.

    >>> import tempfile
    >>> model, plain = (nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0))) for _ in range(2))
    >>> _ = adapt(model, MELoRAConfig(n=2, targets="all-linear", strategy="packed"), rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(load_adapter(plain, save_adapter(model, folder)))
    site      d_in  d_out  n  r  rank  parameters  strategy
    layers/0     4      6  2  1     2          10  packed
    adapters 10 + head 0 = 10 trainable (25.00 %), 30 frozen
    """
    return _put(model, read_adapter(folder), folder)


def warm_start(model: nnx.Module, folder: str | Path) -> Adaptation:
    """Initialises the factors of an adapted model from a saved adapter, but not its head, which is of another task.

    Args:
      model: an adapted model.
      folder: written by `save_adapter` for a model with the same sites.

    Returns:
      The model's `Adaptation`, a table of its sites.

    Raises:
      FileNotFoundError: the folder holds no adapter.
      ValueError: the model has no adapters or has stacked layers, or the saved adapter has other sites, sizes or
        scales. The model is left unchanged.

    Source: LoRA (arXiv 2106.09685), section 5.2, which starts MRPC, RTE and STS-B from an adapter trained on MNLI.

    >>> import tempfile
    >>> model, other = (nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0))) for _ in range(2))
    >>> for seed, each in enumerate((model, other)):
    ...     _ = adapt(each, MELoRAConfig(n=2, targets="all-linear"), rngs=nnx.Rngs(seed))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = warm_start(other, save_adapter(model, folder))
    >>> bool((other.layers[0].a[...] == model.layers[0].a[...]).all())
    True
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
    """Loads an adapter in PEFT's format into `model`, in place, to train or merge it; the inverse of `export_peft`.

    A LoRA becomes adapters with n=1, including rsLoRA, rank_pattern, alpha_pattern and modules_to_save. A
    block-diagonal one becomes the MELoRA that it represents, and a file of `export_peft` returns bit for bit. The files
    of MELoRA's authors are read too; nothing in their pickled adapter_model.bin is executed.

    Args:
      model: the plain base model.
      folder: holds adapter_config.json, and adapter_model.safetensors or adapter_model.bin.

    Returns:
      The model's `Adaptation`, a table of its sites.

    Raises:
      FileNotFoundError: the folder holds no adapter.
      ValueError: a setting has no counterpart, files are damaged, or the adapter is for another model. The model is
        left unchanged.

    >>> import tempfile
    >>> model, plain = (nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0))) for _ in range(2))
    >>> _ = adapt(model, MELoRAConfig(n=2, targets=["layers.0"]), rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     site = import_peft(plain, export_peft(model, folder)).sites[0]
    >>> site.path, site.n
    ('layers/0', 2)
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
    """Writes the adapter in PEFT's format, exactly, for PEFT, vLLM, SGLang and llama.cpp's converter.

    The plain format stores the zeros outside the diagonal blocks, so that its file is n times as large as the adapter.

    Args:
      model: an adapted model whose module paths are the Hugging Face names.
      folder: created if absent; replaced as a whole, or kept if writing fails.
      format: `"lora"`, a plain LoRA of rank Σ r_k; or `"bdlora"`, without zeros in A, which only PEFT reads.
      scores: for the model card, measured values by name.
      data: for the model card, the name or a description of the training data.

    Returns:
      The folder.

    Raises:
      ValueError: there are no adapters, the format is unknown, or `"bdlora"` can't hold these adapters.

    >>> import tempfile
    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> _ = adapt(model, MELoRAConfig(n=2, targets=["layers.0"]), rngs=nnx.Rngs(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in export_peft(model, folder).iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors', 'melora_config.json']
    """
    tree = adapter_tree(model)
    return write_peft(tree, peft_host(model, tree), folder, format, provenance_of(model, scores, data))


def peft_host(model: nnx.Module, tree: AdapterTree) -> PeftHost:
    """What an export of `tree` needs to know about its model, which may be plain, adapted or abstract."""
    model = unstacked(model, nnx.Nothing())
    dense = [path_of(path) for path, node in walk(model) if isinstance(node, nnx.Module) and _is_dense(node)]
    saved = dict(torch_from_flax(_path_in_peft(path, tree), value) for path, value in tree.saved.items())
    tied = _tied_embedding(model)
    if tied is not None and f"{tied}/embedding" in tree.saved:
        # PEFT expects both tied parameters
        saved["lm_head.weight"] = tree.saved[f"{tied}/embedding"]
    return PeftHost(
        saved=saved,
        other_modules=set(dense) - {f"{path}/base" for path in tree.sites} - set(tree.sites),
        tied=tied is not None and (tied in tree.sites or f"{tied}/embedding" in tree.saved),
    )


def _path_in_peft(path: str, tree: AdapterTree) -> str:
    """PEFT also puts the adapted layer inside the adapter, and names its bias accordingly."""
    site, _, name = path.rpartition("/")
    return f"{site}/base_layer/{name}" if site in tree.sites else path


def _tied_embedding(model: nnx.Module) -> str | None:
    """The path of a language model's embedding if it is also the output layer."""
    output = getattr(model, "output_embeddings", None)
    for path, node in walk(model):
        if node is output and isinstance(getattr(node, "base", node), nnx.Embed):
            return path_of(path)
    return None


def spectra(model: nnx.Module) -> dict[str, np.ndarray]:
    """The singular values of each site's ΔW, by path; for DoRA, before its normalisation.

    Args:
      model: an adapted model.

    Returns:
      For each site, float64 values `[R]` in descending order, with R its rank Σ r_k.

    Raises:
      ValueError: the model was not adapted.

    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    >>> _ = adapt(model, MELoRAConfig(n=2, targets="all-linear"), rngs=nnx.Rngs(0))
    >>> spectra(model)["layers/0"].tolist()
    [0.0, 0.0]
    """
    config_of(model)
    sites = adapters_of(unstacked(model, (nnx.Param, StartParam)))
    return {path: singular_values(*map(np.asarray, layer.packed_factors())) for path, layer in sites.items()}


def _is_dense(node: nnx.Module) -> bool:
    return isinstance(node, nnx.Linear | nnx.LinearGeneral | nnx.Einsum | nnx.Embed)
