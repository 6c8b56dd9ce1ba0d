"""Adapters and whole models as plain orbax checkpoints, which orbax restores without this library.

The folder::

    tree/               the checkpoint: a nested dict of arrays with their sharding, keys as in the arrays' paths
    README.md           every array's path, shape and dtype, and the two lines that restore them
    melora_config.json  for adapters: their settings, as `save_adapter` writes them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from melora_jax.adapters.adapt import adapters_of, require_live
from melora_jax.adapters.merge import merge
from melora_jax.adapters.params import FrozenParam
from melora_jax.checkpoints.native_format import CONFIG_FILE, write_json
from melora_jax.checkpoints.save_load import adapter_tree
from melora_jax.files.atomic import atomic_folder
from melora_jax.nn.scan_layers import unstacked
from melora_jax.nn.tree import path_of, without_base

Part = Literal["adapter", "merged", "frozen"]
TREE_FOLDER = "tree"


def save_orbax(model: nnx.Module, folder: str | Path, part: Part = "adapter") -> Path:
    """Writes part of an adapted model as an orbax checkpoint; each array keeps its sharding.

    Args:
      model: an adapted model.
      folder: a new or empty folder, which is written as a whole or not at all.
      part: `"adapter"`, the factors and the modules of `modules_to_save`; `"merged"`, the whole merged model; or
        `"frozen"`, the base's parameters without the adapters.

    Raises:
      ValueError: the model was not adapted, the part is unknown, or the folder holds files.
      ImportError: orbax is not installed.

    >>> save_orbax(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "nowhere", "head")
    Traceback (most recent call last):
    ValueError: part='head' is unknown; choose "adapter", "merged" or "frozen"
    """
    if part not in ("adapter", "merged", "frozen"):
        raise ValueError(f'part={part!r} is unknown; choose "adapter", "merged" or "frozen"')
    checkpointer = _checkpointer()
    tree = adapter_tree(model)  # and with it, that the model was adapted and its arrays are there
    require_live(model)
    arrays = {"adapter": _adapter_arrays, "merged": _merged_arrays, "frozen": _frozen_arrays}[part](model)
    with atomic_folder(folder) as place:
        with checkpointer:
            checkpointer.save((place / TREE_FOLDER).resolve(), _nested(arrays))
        if part == "adapter":
            write_json(place / CONFIG_FILE, tree.facts())
        (place / "README.md").write_text(_readme(arrays, part, tree.base_model), encoding="utf-8")
    return Path(folder)


def _checkpointer() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError("orbax is not installed; pip install 'melora_jax[orbax]'") from error
    return ocp.StandardCheckpointer()


def _adapter_arrays(model: nnx.Module) -> dict[str, jax.Array]:
    return _arrays(nnx.state(unstacked(model, nnx.Param), nnx.Param))


def _merged_arrays(model: nnx.Module) -> dict[str, jax.Array]:
    return _arrays(nnx.state(merge(model)))


def _frozen_arrays(model: nnx.Module) -> dict[str, jax.Array]:
    model = unstacked(model, FrozenParam)
    wrapped = tuple(adapters_of(model))
    return {without_base(path, wrapped): value for path, value in _arrays(nnx.state(model, FrozenParam)).items()}


def _arrays(state: Any) -> dict[str, jax.Array]:
    flat = {path_of(path): variable.get_raw_value() for path, variable in nnx.to_flat_state(state)}
    return {path: value for path, value in flat.items() if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)}


def _nested(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


_PARTS = {
    "adapter": "MELoRA adapters: factors `a` [n i r] and `b` [n r o] of each layer, and modules trained whole",
    "merged": "A model with its adapters merged: dense kernels are [d_in, d_out]",
    "frozen": "The base of an adapted model: dense kernels are [d_in, d_out]",
}


def _readme(arrays: Mapping[str, jax.Array], part: Part, base: str | None) -> str:
    lines = [f"# {_PARTS[part]}", "", f"Base model: {base}." if base else "", "", "```python"]
    lines += ["import orbax.checkpoint as ocp", ""]
    lines += [f'tree = ocp.StandardCheckpointer().restore("/absolute/path/of/this/folder/{TREE_FOLDER}")', "```", ""]
    lines += ["A nested dict; `layer/0/query/a` is `tree['layer']['0']['query']['a']`.", ""]
    lines += ["| path | shape | dtype |", "|---|---|---|"]
    lines += [f"| `{path}` | {list(value.shape)} | {value.dtype} |" for path, value in sorted(arrays.items())]
    return "\n".join(lines) + "\n"
