"""The files of a checkpoint to be written: as many, and each tensor in the same, as in the one the model came from."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from melora_jax.files.safetensors_io import TensorFile, write_tensors
from melora_jax.models.base import HuggingFaceModel
from melora_jax.models.hub.checkpoint import INDEX, WEIGHTS, is_gguf, tensor_files
from melora_jax.models.hub.names import family_of, torch_from_flax, torch_name

_log = logging.getLogger("melora_jax")

SAVED_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16))
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which file each variable goes into, and in which dtype.

    Attributes:
      shards: file name to variable path to dtype.
      indexed: whether an index names the files.
    """

    shards: Mapping[str, Mapping[str, np.dtype]]
    indexed: bool

    @property
    def dtype(self) -> str:
        """The commonest dtype, for config.json."""
        return Counter(dtype.name for shard in self.shards.values() for dtype in shard.values()).most_common(1)[0][0]


def layout_of(model: HuggingFaceModel, dtypes: Mapping[str, np.dtype], dtype: str | None = None) -> Layout:
    """The layout of the checkpoint that `model` came from; one file where there is none to follow.

    Args:
      model: the model.
      dtypes: the dtype of each of its variables, by path.
      dtype: the dtype of all tensors; None takes the narrower of the model's and the checkpoint's.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    held = _held(model, dtypes)
    last = max((name for name, _ in held.values()), default=WEIGHTS)
    shards: dict[str, dict[str, np.dtype]] = {}
    for path, own in dtypes.items():
        name, stored = held.get(path, (last, own))
        chosen = SAVED_DTYPES[dtype] if dtype else min(stored, np.dtype(own), key=lambda one: one.itemsize)
        shards.setdefault(name, {})[path] = chosen
    indexed = last != WEIGHTS
    if not dtype and held:
        _say_narrowed(dtypes, shards, model.folder)
    return Layout({name: shards[name] for name in sorted(shards)}, indexed)


def _held(model: HuggingFaceModel, dtypes: Mapping[str, np.dtype]) -> dict[str, tuple[str, np.dtype]]:
    """The file and dtype of each variable in the checkpoint on disk, as far as it is there."""
    source = Path(model.folder)
    if not model.folder or is_gguf(source) or not any((source / name).is_file() for name in (WEIGHTS, INDEX)):
        return {}
    family = family_of(model.config, str(source))
    paths = {torch_name(path): path for path in dtypes}
    files = tensor_files(source)
    held = {}
    for file in sorted(set(files.values())):
        with TensorFile(file) as tensors:
            for key in tensors.keys():
                path = paths.get(family.canonical(key, model.task))
                if path is not None:
                    held[path] = (file.name, tensors.dtype(key))
    return held


def _say_narrowed(dtypes: Mapping[str, np.dtype], shards: Mapping[str, Mapping[str, np.dtype]], folder: str) -> None:
    narrowed = [dtype for shard in shards.values() for path, dtype in shard.items() if dtype != dtypes[path]]
    if narrowed:
        names = ", ".join(sorted({dtype.name for dtype in narrowed}))
        _log.info("%d tensors are saved as %s, as in %s; dtype= chooses another", len(narrowed), names, folder)


def write_shards(layout: Layout, variables: Mapping[str, nnx.Variable], folder: Path) -> None:
    """Writes the files of a layout, one after another, and their index.

    Raises:
      ValueError: a value beyond what its dtype holds.
      OSError: the disk is full or cannot be written.
    """
    weight_map, total = {}, 0
    for name, shard in layout.shards.items():
        tensors = dict(torch_from_flax(path, _as(path, variables[path], dtype)) for path, dtype in shard.items())
        write_tensors(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if layout.indexed:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _as(path: str, variable: nnx.Variable, dtype: np.dtype) -> np.ndarray:
    # a copy, since an array keeps the host's copy of itself as long as it lives
    value = np.asarray(jnp.array(variable.get_value(), dtype=dtype, copy=True))
    if dtype == np.float16 and not np.isfinite(value).all() and bool(jnp.isfinite(variable.get_value()).all()):
        raise ValueError(
            f'{path} has values beyond those of float16, which the checkpoint has; save with dtype="float32"'
        )
    return value
