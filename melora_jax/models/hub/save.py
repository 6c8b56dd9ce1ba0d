"""Saving one of our models as a Hugging Face checkpoint that transformers loads.

Its tensors are spread over files as in the checkpoint that the model came from.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.files.atomic import atomic_folder
from melora_jax.files.safetensors_io import write_tensors
from melora_jax.models.auto import Model, abstract_model
from melora_jax.models.base import MODEL_DTYPES, HuggingFaceModel, with_dtype
from melora_jax.models.gguf.tokenizer import tokenizer_from_gguf
from melora_jax.models.hub.checkpoint import (
    GENERATION_CONFIG,
    INDEX,
    TOKENIZER_FILES,
    WEIGHTS,
    Checkpoint,
    checkpoint_source,
    is_gguf,
    origin_of,
    tokenizer_files,
)
from melora_jax.models.hub.names import listed, torch_from_flax, torch_name
from melora_jax.nn.scan_layers import unstacked
from melora_jax.nn.tree import variables_of

_log = logging.getLogger("melora_jax")

SAVED_DTYPES = MODEL_DTYPES | {"float16": jnp.dtype("float16")}


def save_pretrained(
    model: Model, folder: str | Path, tokenizer_from: str | Path | None = None, *, dtype: str | None = None
) -> None:
    """Writes a model as a Hugging Face checkpoint, with its tokenizer's files where they are known.

    Each tensor goes into the file that held it in the checkpoint that the model came from, in the narrower of its own
    dtype and the one it has there; new tensors go into the last file, and several files get an index. Memory is needed
    for one file at a time. The folder appears whole or not at all; transformers' auto classes load it.

    Args:
      model: a model from `from_pretrained`, with plain Flax layers (`merge` makes it so).
      folder: the folder to write.
      tokenizer_from: folder or hub id whose tokenizer files are copied, or GGUF file whose tokenizer is built and
        saved; None takes the checkpoint that the model was loaded from.
      dtype: "float32", "bfloat16" or "float16" for all tensors; None chooses for each as above. A dense kernel
        `[d_in, d_out]` is stored as `[d_out, d_in]`.

    Raises:
      ValueError: the model has variables with no place in the Hugging Face layout (adapters), lacks some, or has
        changed shapes; or `tokenizer_from` has no tokenizer, or a GGUF file one that is not supported; or `folder`
        cannot be replaced; or the dtype is unknown, or too narrow for a value.
      OSError: the disk is full or cannot be written.

    Source: Hugging Face transformers, whose names and layouts it writes.

    >>> import tempfile
    >>> from melora_jax.models import model_from_config
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "bert", **sizes})
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save_pretrained(model, f"{parent}/saved")
    ...     sorted(file.name for file in Path(parent, "saved").iterdir())
    ['config.json', 'model.safetensors']
    """
    variables = variables_of(unstacked(model))
    origin = _require_layout(model, variables)
    _require_dtype(dtype)
    write_tokenizer = _tokenizer_writer(origin, tokenizer_from)
    layout = layout_of(origin, model.task, {path: variable.dtype for path, variable in variables.items()}, dtype)
    with atomic_folder(folder) as temporary:
        text = json.dumps(with_dtype(model.config, layout.dtype).to_dict(), indent=2, sort_keys=True)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        write_shards(layout, variables, temporary)
        write_tokenizer(temporary)
        if origin.generation_config is not None:
            shutil.copyfile(origin.generation_config, temporary / GENERATION_CONFIG)


def _require_dtype(dtype: str | None) -> None:
    if dtype not in (None, *SAVED_DTYPES):
        raise ValueError(f"dtype {dtype!r} is unknown; choose from {', '.join(SAVED_DTYPES)}, or leave it out")


def _require_layout(model: Model, variables: Mapping[str, nnx.Variable]) -> Checkpoint:
    """The checkpoint that the model came from, after checking that the variables are those of its configuration."""
    if not isinstance(model, HuggingFaceModel):
        raise ValueError(
            f"{type(model).__name__} did not come from from_pretrained, so it has no Hugging Face names; load it so"
        )
    origin = origin_of(model)
    plain = abstract_model(origin, task=model.task, num_labels=model.num_labels, dtype=model.dtype)
    expected = {path: tuple(variable.shape) for path, variable in variables_of(plain).items()}
    strange = sorted(set(variables) - set(expected))
    if strange:
        raise ValueError(
            f"the model has variables with no place in the Hugging Face layout ({listed(strange)}); save"
            " mj.merge(model), or keep the adapters alone with mj.save_adapter(model, folder)"
        )
    missing = sorted(set(expected) - set(variables))
    if missing:
        raise ValueError(
            f"the model lacks {listed(missing)}, which the Hugging Face layout of its config needs; put the layer back"
        )
    for path, shape in expected.items():
        if tuple(variables[path].shape) != shape:
            raise ValueError(
                f"{path} has shape {list(variables[path].shape)}, the model's config asks for {list(shape)};"
                " restore it, or build the model with model_from_config from a config of that size"
            )
    return origin


def _tokenizer_writer(origin: Checkpoint, tokenizer_from: str | Path | None) -> Callable[[Path], object]:
    """What writes the tokenizer's files into a folder; raises ValueError, before any is written, if there are none."""
    source = origin.source if tokenizer_from is None else checkpoint_source(tokenizer_from)
    if source is None or not source.exists():
        if source is not None:
            _log.warning("%s is gone, so no tokenizer was saved; name one with tokenizer_from", source)
        return lambda folder: None
    if is_gguf(source):
        return tokenizer_from_gguf(source).save_pretrained
    found = tokenizer_files(source)
    if tokenizer_from is not None and not found:
        raise ValueError(f"{source} holds no tokenizer (one of {', '.join(TOKENIZER_FILES)}); name another folder")
    return lambda folder: [shutil.copyfile(file, folder / file.name) for file in found]


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """Which file each variable goes into, and in which dtype.

    Attributes:
      shards: file name to variable path to dtype.
      indexed: whether an index names the files.
    """

    shards: Mapping[str, Mapping[str, np.dtype]]
    indexed: bool

    @property
    def dtype(self) -> str:
        """The most common dtype, for config.json."""
        return Counter(dtype.name for shard in self.shards.values() for dtype in shard.values()).most_common(1)[0][0]


def layout_of(origin: Checkpoint, task: str, dtypes: Mapping[str, np.dtype], dtype: str | None = None) -> ShardLayout:
    """The layout of the checkpoint that a model came from; one file if there is none to follow.

    Args:
      origin: that checkpoint, whose files may be gone.
      task: the model's.
      dtypes: the dtype of each of its variables, by path.
      dtype: the dtype of all tensors; None takes the narrower of the model's and the checkpoint's.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    held = _held(origin, task, dtypes)
    last = max((name for name, _ in held.values()), default=WEIGHTS)
    shards: dict[str, dict[str, np.dtype]] = {}
    for path, own in dtypes.items():
        name, stored = held.get(path, (last, own))
        chosen = SAVED_DTYPES[dtype] if dtype else min(stored, np.dtype(own), key=lambda one: one.itemsize)
        shards.setdefault(name, {})[path] = chosen
    indexed = last != WEIGHTS
    if not dtype and held:
        _say_narrowed(dtypes, shards, origin)
    return ShardLayout({name: shards[name] for name in sorted(shards)}, indexed)


def _held(origin: Checkpoint, task: str, dtypes: Mapping[str, np.dtype]) -> dict[str, tuple[str, np.dtype]]:
    """The file and dtype of each variable in the checkpoint on disk; nothing if it is gone."""
    if not origin.has_safetensors:
        return {}
    paths = {torch_name(path): path for path in dtypes}
    names = {key: origin.family.canonical(key, task) for key in origin.files}
    stored = {paths[name]: origin.files[key] for key, name in names.items() if name in paths}
    return {path: (tensor.file.name, tensor.dtype) for path, tensor in stored.items()}


def _say_narrowed(
    dtypes: Mapping[str, np.dtype], shards: Mapping[str, Mapping[str, np.dtype]], origin: Checkpoint
) -> None:
    narrowed = [dtype for shard in shards.values() for path, dtype in shard.items() if dtype != dtypes[path]]
    if narrowed:
        names = ", ".join(sorted({dtype.name for dtype in narrowed}))
        _log.info("%d tensors are saved as %s, as in %s; dtype= chooses another", len(narrowed), names, origin.source)


def write_shards(layout: ShardLayout, variables: Mapping[str, nnx.Variable], folder: Path) -> None:
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
    # a copy, because an array keeps its copy on the host for as long as it lives
    value = np.asarray(jnp.array(variable.get_value(), dtype=dtype, copy=True))
    if dtype == np.float16 and not np.isfinite(value).all() and bool(jnp.isfinite(variable.get_value()).all()):
        raise ValueError(
            f'{path} has values too large for float16, the dtype of the checkpoint; save with dtype="float32"'
        )
    return value
