"""Loading a Hugging Face checkpoint into our models, one tensor at a time.

Which tensor fills which variable is planned first, so that every mismatch is found before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from melora_jax.files.safetensors_io import TensorFile
from melora_jax.models.auto import Model, ModelOptions, abstract_model
from melora_jax.models.base import LoadReport
from melora_jax.models.gguf.tensors import GGUFTensors
from melora_jax.models.hub.checkpoint import Checkpoint, ModelSource, open_checkpoint
from melora_jax.models.hub.names import Family, flax_from_torch, listed, torch_name, torch_shape
from melora_jax.models.hub.placement import shardings_of
from melora_jax.nn.sharding import put
from melora_jax.nn.tree import variables_of

_log = logging.getLogger("melora_jax")

_HEAD, _EMBEDDING = "lm_head.weight", "model/embed_tokens/embedding"


def from_pretrained(
    path_or_id: ModelSource,
    *,
    rngs: nnx.Rngs | None = None,
    mesh: Mesh | None = None,
    **options: Unpack[ModelOptions],
) -> Model:
    """Loads a checkpoint from a folder, a GGUF file or the Hugging Face hub: an encoder or a decoder.

    A head (or pooler) that the checkpoint lacks is drawn from N(0, initializer_range²). What was drawn and what was
    left out goes to the logger "melora_jax", and stays in `model.load_report`.

    Args:
      path_or_id: a folder with config.json and safetensors, a GGUF file of a decoder, a hub id such as
        "FacebookAI/roberta-base", or an open `Checkpoint`.
      rngs: where a missing head is drawn from; None is `nnx.Rngs(0)`.
      mesh: from `make_mesh`. Each process then reads only the parts of each tensor that its devices hold, and puts them
        straight in place.
      **options: what the model is built for, see `ModelOptions`:
        task: "sequence-classification" (the default), "regression" (one output), "causal-lm" or "encoder" (last hidden
          states).
        num_labels: outputs of the head; None takes their number from config.json.
        label_names: a name for each label; None takes them from config.json.
        dtype: "float32" (the default) or "bfloat16", of parameters and computation alike.
        remat: what a decoder's backward pass computes again: "none" (the default), "dots" or "full".

    Returns:
      The model, with dense kernels `[d_in, d_out]` and embeddings `[vocab_size, hidden_size]` in `dtype`. Called with
      token ids `[b, t]` it returns logits `[b, num_labels]`, float32 logits `[b, t, vocab_size]` for "causal-lm", or
      hidden states `[b, t, hidden_size]` for "encoder".

    Raises:
      FileNotFoundError: the folder, or a file of the checkpoint, is not there; or there is only a pickled one.
      ValueError: the checkpoint is damaged, does not fit its config.json or the head asked for, or is not supported.

    Source: Hugging Face transformers, whose logits it reproduces; https://github.com/ggml-org/ggml for GGUF.

    >>> import tempfile
    >>> from melora_jax.models import model_from_config, save_pretrained
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save_pretrained(model_from_config({"model_type": "bert", **sizes}, task="encoder"), f"{parent}/bert")
    ...     model = from_pretrained(f"{parent}/bert", num_labels=3)
    >>> model(jnp.array([[1, 2, 3]])).shape, model.load_report.initialised
    ((1, 3), ('classifier/bias', 'classifier/kernel'))
    """
    checkpoint = open_checkpoint(path_or_id)
    model = abstract_model(checkpoint, **options)
    plan = load_plan(checkpoint, model)
    _fill(model, checkpoint, plan, nnx.Rngs(0) if rngs is None else rngs, mesh)
    _note(model, checkpoint, plan)
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """How a checkpoint fills a model.

    Attributes:
      sources: variable path to (file, tensor name in it).
      initialised: paths of the variables that the checkpoint lacks and that may start at random.
      ignored: tensors that the model has no use for, each with the reason.
      copies: variable path to the (file, tensor name) of a second copy, which must not differ: a tied head.
    """

    sources: dict[str, tuple[Path, str]]
    initialised: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]
    copies: dict[str, tuple[Path, str]]


def load_plan(checkpoint: Checkpoint, model: Model) -> LoadPlan:
    """Matches the tensors of a checkpoint to the variables of a model.

    Raises:
      FileNotFoundError: there are no tensors, or a file is missing.
      ValueError: a body tensor is missing, a tensor is surplus or there twice, or a shape differs.
    """
    family, files, shapes = checkpoint.family, checkpoint.files, _shapes_of(model)
    # they tell whose head a `classifier` tensor is
    architectures = tuple(checkpoint.config.get("architectures") or ())
    paths = {torch_name(path): path for path in shapes}
    sources: dict[str, tuple[Path, str]] = {}
    ignored: list[tuple[str, str]] = []
    copies: dict[str, tuple[Path, str]] = {}
    surplus: dict[str, Path] = {}
    for key in sorted(files):
        name = family.canonical(key, model.task)
        if reason := family.ignorable(name, model.task, architectures):
            ignored.append((key, reason))
        elif name not in paths and name == _HEAD and family.is_decoder:
            copies[_EMBEDDING] = (files[key], key)
            ignored.append((key, "tied to the embedding"))
        elif name not in paths:
            surplus[key] = files[key]
        elif paths[name] in sources:
            raise ValueError(
                f"{checkpoint.source} holds {sources[paths[name]][1]} and {key}, one tensor twice; remove one of them"
            )
        else:
            sources[paths[name]] = (files[key], key)
    initialised = tuple(sorted(set(shapes) - set(sources)))
    _require_complete(checkpoint, sources, initialised, surplus)
    _require_shapes(checkpoint, model, shapes, sources)
    return LoadPlan(sources=sources, initialised=initialised, ignored=tuple(ignored), copies=copies)


def _shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {path: tuple(variable.shape) for path, variable in variables_of(model).items()}


def _top(family: Family, path: str) -> str:
    """The head module or "pooler" that a variable belongs to, or "" for the rest of the body."""
    first = path.removeprefix(f"{family.prefix}/").split("/")[0]
    return first if first in (*family.head, "pooler") else ""


def _require_complete(
    checkpoint: Checkpoint,
    sources: Mapping[str, tuple[Path, str]],
    initialised: Sequence[str],
    surplus: Mapping[str, Path],
) -> None:
    family, where = checkpoint.family, checkpoint.source
    partly_there = {_top(family, path) for path in sources} | {""}
    missing = [torch_name(path) for path in initialised if _top(family, path) in partly_there]
    if missing == [_HEAD]:
        raise ValueError(
            f"the checkpoint in {where} lacks {_HEAD}; if its embedding is its head too, set tie_word_embeddings to"
            ' true in its config.json, else load its body alone with task="encoder"'
        )
    if missing:
        also = f" and has {listed(list(surplus))}, which the model lacks" if surplus else ""
        raise ValueError(
            f"the checkpoint in {where} lacks {listed(missing)}{also}; check model_type and the sizes in its"
            " config.json, or fetch it again"
        )
    if surplus:
        in_files = f" (in {', '.join(sorted({file.name for file in surplus.values()}))})"
        raise ValueError(
            f"the checkpoint in {where} holds {listed(list(surplus))}{in_files}, for which the"
            f" {family.model_type} of its config.json has no place; check model_type and the sizes there"
        )


def _require_shapes(
    checkpoint: Checkpoint, model: Model, shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, tuple[Path, str]]
) -> None:
    for file in sorted({file for file, _ in sources.values()}):
        with checkpoint.open(file) as tensors:
            for path, (held_in, key) in sources.items():
                if held_in == file:
                    is_head = _top(checkpoint.family, path) in checkpoint.family.head
                    _require_fits(tensors, key, path, torch_shape(path, shapes[path]), model if is_head else None)


def _require_fits(
    tensors: TensorFile | GGUFTensors, key: str, path: str, expected: tuple[int, ...], classifier: Model | None
) -> None:
    """Raises ValueError unless tensor `key` fits the variable at `path`, in the head of `classifier` if given."""
    if not jnp.issubdtype(tensors.dtype(key), jnp.floating):
        raise ValueError(
            f"{key} in {tensors.path} is {tensors.dtype(key)}; quantised checkpoints are not supported,"
            " use the one they were made from"
        )
    stored = tensors.shape(key)
    if stored == expected:
        return
    rest_fits = stored and stored[1:] == expected[1:]
    if classifier is not None and rest_fits and expected[0] == classifier.num_labels:
        raise ValueError(
            f"the head {key} in {tensors.path} has {stored[0]} outputs, the {classifier.task} asked for has"
            f' {classifier.num_labels}; load it with task="sequence-classification", num_labels={stored[0]}, or start a'
            ' fresh head from the body alone: save_pretrained(from_pretrained(FOLDER, task="encoder"), BODY_FOLDER),'
            " then load BODY_FOLDER"
        )
    remedy = "correct the sizes in config.json, or fetch the checkpoint again"
    if path.endswith("embed_tokens/embedding") and rest_fits:
        remedy = f"its vocabulary is not that of config.json: if the tokenizer fits it, set vocab_size to {stored[0]}"
    raise ValueError(
        f"{key} in {tensors.path} has shape {list(stored)}, config.json asks for {list(expected)}; {remedy}"
    )


def _fill(model: Model, checkpoint: Checkpoint, plan: LoadPlan, rngs: nnx.Rngs, mesh: Mesh | None) -> None:
    """Gives every variable its value: those of the checkpoint, and what it lacks drawn at random."""
    variables = variables_of(model)
    places = {} if mesh is None else shardings_of(model, mesh)
    _require_equal_copies(checkpoint, plan, variables)
    for path, value in _read(checkpoint, plan, variables, places):
        variables[path].set_value(value)
    normal = nnx.initializers.normal(checkpoint.sizes.initializer_range)
    for path in plan.initialised:
        shape, dtype = variables[path].shape, variables[path].dtype
        value = jnp.zeros(shape, dtype) if path.endswith("/bias") else normal(rngs.params(), shape).astype(dtype)
        variables[path].set_value(put(value, places[path]) if places else value)


def _read(
    checkpoint: Checkpoint,
    plan: LoadPlan,
    variables: Mapping[str, nnx.Variable],
    places: Mapping[str, NamedSharding],
) -> Iterator[tuple[str, jax.Array]]:
    for file in sorted({file for file, _ in plan.sources.values()}):
        with checkpoint.open(file) as tensors:
            for path, (held_in, key) in plan.sources.items():
                if held_in == file and places:
                    yield path, _read_parts(tensors, key, path, variables[path], places[path])
                elif held_in == file:
                    _, array = flax_from_torch(torch_name(path), tensors.read(key))
                    yield path, jnp.asarray(array, dtype=variables[path].dtype)


def _read_parts(
    tensors: TensorFile | GGUFTensors, key: str, path: str, variable: nnx.Variable, sharding: NamedSharding
) -> jax.Array:
    """One variable, of which the part of each device is read by itself."""

    def part(index: Any) -> np.ndarray:
        stored = tensors.read_part(key, torch_shape(path, index))
        return np.ascontiguousarray(flax_from_torch(torch_name(path), stored)[1]).astype(variable.dtype)

    return jax.make_array_from_callback(tuple(variable.shape), sharding, part)


def _require_equal_copies(checkpoint: Checkpoint, plan: LoadPlan, variables: Mapping[str, nnx.Variable]) -> None:
    for path, (file, key) in plan.copies.items():
        own_file, own_key = plan.sources[path]
        dtype = variables[path].dtype
        with checkpoint.open(file) as tensors, checkpoint.open(own_file) as own:
            equal = np.array_equal(tensors.read(key).astype(dtype), own.read(own_key).astype(dtype))
        if not equal:
            raise ValueError(
                f"{key} in {file} differs from {torch_name(path)}, but config.json ties the two; set"
                " tie_word_embeddings to false there"
            )


def _note(model: Model, checkpoint: Checkpoint, plan: LoadPlan) -> None:
    """What the model keeps of where it came from, and what the log says of it."""
    model.name_or_path = checkpoint.name
    model.folder = "" if checkpoint.source is None else str(checkpoint.source.resolve())
    files = tuple(sorted({file.name for file, _ in plan.sources.values()}))
    model.load_report = LoadReport(files=files, initialised=plan.initialised, ignored=plan.ignored)
    if plan.initialised:
        drawn = ", ".join(plan.initialised)
        _log.warning("%s has no %s: drawn at random, train it before use", checkpoint.source, drawn)
    if plan.ignored:
        left_out = ", ".join(f"{name} ({reason})" for name, reason in plan.ignored)
        _log.info("%s: left out %s", checkpoint.source, left_out)
