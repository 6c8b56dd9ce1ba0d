"""Saving one of our models as a Hugging Face checkpoint that transformers loads."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from flax import nnx

from melora_jax.files.atomic import atomic_folder
from melora_jax.models.auto import Model, model_from_config
from melora_jax.models.base import HuggingFaceModel, with_dtype
from melora_jax.models.gguf.tokenizer import tokenizer_from_gguf
from melora_jax.models.hub.checkpoint import GENERATION_CONFIG, TOKENIZER_FILES, checkpoint_source, is_gguf
from melora_jax.models.hub.load import variables_of
from melora_jax.models.hub.names import listed
from melora_jax.models.hub.shards import SAVED_DTYPES, layout_of, write_shards
from melora_jax.nn.scan_layers import unstacked

_log = logging.getLogger("melora_jax")


def save_pretrained(
    model: Model, folder: str | Path, tokenizer_from: str | Path | None = None, *, dtype: str | None = None
) -> None:
    """Writes a model as a Hugging Face checkpoint, with its tokenizer's files where they are known.

    Each tensor goes into the file that held it in the checkpoint that the model came from, in the narrower of the dtype
    it had there and its own, with an index where there was one; new tensors go into the last file. Memory is needed for
    one file at a time. The folder appears whole or not at all; transformers' auto classes load it.

    Args:
      model: a model from `from_pretrained`, with plain Flax layers (`merge` makes it so).
      folder: the folder to write.
      tokenizer_from: folder or hub id whose tokenizer files are copied, or GGUF file whose tokenizer is built and
        saved; None takes the checkpoint that the model was loaded from.
      dtype: "float32", "bfloat16" or "float16" for all tensors; None as said above.

    Raises:
      ValueError: the model has variables with no place in the Hugging Face layout (adapters), lacks some, or has
        changed shapes; or `tokenizer_from` has no tokenizer, or a GGUF file one that is not supported; or `folder`
        cannot be replaced; or the dtype is unknown, or too narrow for a value.
      OSError: the disk is full or cannot be written.

    >>> import tempfile
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "bert", **sizes})
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save_pretrained(model, f"{parent}/saved")
    ...     sorted(file.name for file in Path(parent, "saved").iterdir())
    ['config.json', 'model.safetensors']
    """
    variables = variables_of(unstacked(model))
    _require_layout(model, variables)
    _require_dtype(dtype)
    write_tokenizer = _tokenizer_writer(model, tokenizer_from)
    layout = layout_of(model, {path: variable.dtype for path, variable in variables.items()}, dtype)
    with atomic_folder(folder) as temporary:
        text = json.dumps(with_dtype(model.config, layout.dtype).to_dict(), indent=2, sort_keys=True)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        write_shards(layout, variables, temporary)
        write_tokenizer(temporary)
        generation = Path(model.folder) / GENERATION_CONFIG
        if model.folder and generation.is_file():
            shutil.copyfile(generation, temporary / GENERATION_CONFIG)


def _require_dtype(dtype: str | None) -> None:
    if dtype not in (None, *SAVED_DTYPES):
        raise ValueError(f"dtype {dtype!r} is unknown; choose from {', '.join(SAVED_DTYPES)}, or leave it out")


def _require_layout(model: Model, variables: Mapping[str, nnx.Variable]) -> None:
    if not isinstance(model, HuggingFaceModel):
        raise ValueError(
            f"{type(model).__name__} did not come from from_pretrained, so has no Hugging Face names; load it so"
        )
    plain = nnx.eval_shape(
        lambda: model_from_config(model.config, task=model.task, num_labels=model.num_labels, dtype=model.dtype)
    )
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


def _tokenizer_writer(model: Model, tokenizer_from: str | Path | None) -> Callable[[Path], object]:
    """What writes the tokenizer's files into a folder; that there are some is known before anything is written."""
    source = Path(model.folder) if tokenizer_from is None else checkpoint_source(tokenizer_from)
    if tokenizer_from is None and not (model.folder and source.exists()):
        if model.folder:
            _log.warning("%s is gone, so no tokenizer was saved; name one with tokenizer_from", model.folder)
        return lambda folder: None
    if is_gguf(source):
        return tokenizer_from_gguf(source).save_pretrained
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if tokenizer_from is not None and not found:
        raise ValueError(f"{source} holds no tokenizer (one of {', '.join(TOKENIZER_FILES)}); name another folder")
    return lambda folder: [shutil.copyfile(file, folder / file.name) for file in found]
