"""Loading a Hugging Face checkpoint into our models, one tensor at a time.

Which tensor fills which variable is planned first, so that every mismatch is found before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from melora_jax.models.auto import Model, ModelOptions, build_model
from melora_jax.models.base import LoadReport
from melora_jax.models.families import Family
from melora_jax.models.hub.checkpoint import Checkpoint, ModelSource, open_checkpoint
from melora_jax.models.hub.names import flax_part, listed, torch_name, torch_shape
from melora_jax.models.hub.placement import shardings_of
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
    model = nnx.eval_shape(lambda: build_model(checkpoint, **options))
    variables = variables_of(model)
    # they tell whose head a `classifier` tensor is
    architectures = tuple(checkpoint.config.get("architectures") or ())
    names, ignored = checkpoint.family.sorted_out(checkpoint.files, model.task, architectures)
    shapes = {path: tuple(variable.shape) for path, variable in variables.items()}
    plan = load_plan(checkpoint, model, shapes, names, ignored)
    _note(model, checkpoint, plan)
    _fill(variables, checkpoint, plan, nnx.Rngs(0) if rngs is None else rngs, shardings_of(model, mesh))
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """How a checkpoint fills a model.

    Attributes:
      sources: variable path to the name of its tensor.
      initialised: paths of the variables that the checkpoint lacks and that may start at random.
      ignored: tensors that the model has no use for, each with the reason.
      copies: variable path to the name of a second copy, which must not differ: a tied head.
    """

    sources: dict[str, str]
    initialised: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]
    copies: dict[str, str]


def load_plan(
    checkpoint: Checkpoint,
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    ignored: tuple[tuple[str, str], ...],
) -> LoadPlan:
    """Matches the tensors of a checkpoint to the variables of a model.

    Args:
      checkpoint: the checkpoint.
      model: the model, with or without values.
      shapes: the shape of each of its variables, by path.
      names: the canonical name of each tensor that is of use to the model.
      ignored: the other tensors, each with the reason.

    Raises:
      ValueError: a body tensor is missing, a tensor is surplus or there twice, or a shape differs.
    """
    paths = {torch_name(path): path for path in shapes}
    sources: dict[str, str] = {}
    copies: dict[str, str] = {}
    surplus: list[str] = []
    for key, name in names.items():
        if name not in paths and name == _HEAD and checkpoint.family.is_decoder:
            copies[_EMBEDDING] = key
        elif name not in paths:
            surplus.append(key)
        elif paths[name] in sources:
            raise ValueError(
                f"{checkpoint.source} holds {sources[paths[name]]} and {key}, one tensor twice; remove one of them"
            )
        else:
            sources[paths[name]] = key
    initialised = tuple(sorted(set(shapes) - set(sources)))
    _require_complete(checkpoint, sources, initialised, surplus)
    for path, key in sources.items():
        is_head = _top(checkpoint.family, path) in checkpoint.family.head
        _require_fits(checkpoint, key, path, torch_shape(path, shapes[path]), model if is_head else None)
    tied = tuple((key, "tied to the embedding") for key in copies.values())
    return LoadPlan(sources=sources, initialised=initialised, ignored=tuple(sorted(ignored + tied)), copies=copies)


def _top(family: Family, path: str) -> str:
    """The head module or "pooler" that a variable belongs to, or "" for the rest of the body."""
    first = path.removeprefix(f"{family.prefix}/").split("/")[0]
    return first if first in (*family.head, "pooler") else ""


def _require_complete(
    checkpoint: Checkpoint,
    sources: Mapping[str, str],
    initialised: Sequence[str],
    surplus: Sequence[str],
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
        also = f" and has {listed(surplus)}, which the model lacks" if surplus else ""
        raise ValueError(
            f"the checkpoint in {where} lacks {listed(missing)}{also}; check model_type and the sizes in its"
            " config.json, or fetch it again"
        )
    if surplus:
        in_files = f" (in {', '.join(sorted({checkpoint.files[key].file.name for key in surplus}))})"
        raise ValueError(
            f"the checkpoint in {where} holds {listed(surplus)}{in_files}, for which the"
            f" {family.model_type} of its config.json has no place; check model_type and the sizes there"
        )


def _require_fits(
    checkpoint: Checkpoint, key: str, path: str, expected: tuple[int, ...], classifier: Model | None
) -> None:
    """Raises ValueError unless tensor `key` fits the variable at `path`, in the head of `classifier` if given."""
    tensor = checkpoint.files[key]
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(
            f"{key} in {tensor.file} is {tensor.dtype}; quantised checkpoints are not supported,"
            " use the one they were made from"
        )
    stored = tensor.shape
    if stored == expected:
        return
    rest_fits = stored and stored[1:] == expected[1:]
    if classifier is not None and rest_fits and expected[0] == classifier.num_labels:
        raise ValueError(
            f"the head {key} in {tensor.file} has {stored[0]} outputs, the {classifier.task} asked for has"
            f' {classifier.num_labels}; load it with task="sequence-classification", num_labels={stored[0]}, or start a'
            ' fresh head from the body alone: save_pretrained(from_pretrained(FOLDER, task="encoder"), BODY_FOLDER),'
            " then load BODY_FOLDER"
        )
    remedy = "correct the sizes in config.json, or fetch the checkpoint again"
    if path.endswith("embed_tokens/embedding") and rest_fits:
        remedy = f"its vocabulary is not that of config.json: if the tokenizer fits it, set vocab_size to {stored[0]}"
    raise ValueError(
        f"{key} in {tensor.file} has shape {list(stored)}, config.json asks for {list(expected)}; {remedy}"
    )


def _note(model: Model, checkpoint: Checkpoint, plan: LoadPlan) -> None:
    """What the model keeps of where it came from, and what the log says of it."""
    model.name_or_path = checkpoint.name
    model.folder = "" if checkpoint.source is None else str(checkpoint.source.resolve())
    files = tuple(sorted({checkpoint.files[key].file.name for key in plan.sources.values()}))
    model.load_report = LoadReport(files=files, initialised=plan.initialised, ignored=plan.ignored)
    if plan.initialised:
        drawn = ", ".join(plan.initialised)
        _log.warning("%s has no %s: drawn at random, train it before use", checkpoint.source, drawn)
    if plan.ignored:
        left_out = ", ".join(f"{name} ({reason})" for name, reason in plan.ignored)
        _log.info("%s: left out %s", checkpoint.source, left_out)


def _fill(
    variables: Mapping[str, nnx.Variable],
    checkpoint: Checkpoint,
    plan: LoadPlan,
    rngs: nnx.Rngs,
    places: Mapping[str, NamedSharding],
) -> None:
    """Gives every variable its value: those of the checkpoint, and what it lacks drawn at random."""
    normal = nnx.initializers.normal(checkpoint.sizes.initializer_range)
    for path in plan.initialised:
        shape = variables[path].shape
        value = jnp.zeros(shape) if path.endswith("/bias") else normal(rngs.params(), shape)
        _set(variables[path], places.get(path), np.asarray(value).__getitem__)
    for path, key in plan.copies.items():
        checkpoint.require_equal(key, plan.sources[path], variables[path].dtype)
    paths = {key: path for path, key in plan.sources.items()}
    for key, tensors in checkpoint.opened(paths):
        path = paths[key]
        _set(variables[path], places.get(path), partial(flax_part, path, partial(tensors.read_part, key)))


def _set(variable: nnx.Variable, place: NamedSharding | None, part: Callable[[tuple[slice, ...]], np.ndarray]) -> None:
    """Gives a variable the value that `part` reads: on a mesh, of each device the part that it holds."""
    if place is None:
        everything = (slice(None),) * len(variable.shape)
        variable.set_value(jnp.asarray(part(everything), dtype=variable.dtype))
    else:

        def stored(index: Any) -> np.ndarray:
            return np.ascontiguousarray(part(index)).astype(variable.dtype)

        variable.set_value(jax.make_array_from_callback(tuple(variable.shape), place, stored))
