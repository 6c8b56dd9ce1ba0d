"""Loading a Hugging Face checkpoint into our models, one tensor at a time.

Which tensor fills which variable is planned first, so that every mismatch is found before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from melora_jax.files.safetensors_io import TensorFile
from melora_jax.models.auto import DTYPES, Model, model_from_config, sizes_of
from melora_jax.models.base import LoadReport
from melora_jax.models.gguf.tensors import GGUFTensors
from melora_jax.models.hub.checkpoint import checkpoint_source, config_of, open_tensors, tensor_files
from melora_jax.models.hub.names import Family, family_of, flax_from_torch, listed, torch_name, torch_shape
from melora_jax.models.hub.placement import shardings_of
from melora_jax.nn.sharding import put

_log = logging.getLogger("melora_jax")


def from_pretrained(
    path_or_id: str | Path,
    *,
    task: str = "sequence-classification",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: str = "float32",
    remat: str = "none",
    rngs: nnx.Rngs | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a checkpoint from a folder, a GGUF file or the Hugging Face hub: an encoder or a decoder.

    A head (or pooler) that the checkpoint lacks is drawn from N(0, initializer_range²). What was drawn and what was
    left out goes to the logger "melora_jax", and stays in `model.load_report`.

    Args:
      path_or_id: a folder with config.json and safetensors, a GGUF file of a decoder, or a hub id.
      task: "sequence-classification", "regression" (one output), "causal-lm" or "encoder" (last hidden states).
      num_labels: outputs of the head; None takes their number from config.json.
      label_names: a name for each label; None takes them from config.json.
      dtype: "float32" or "bfloat16", of parameters and computation alike.
      remat: what a decoder's backward pass computes again: "none", "dots" or "full".
      rngs: where a missing head is drawn from; None is `nnx.Rngs(0)`.
      mesh: from `make_mesh`. Each process then reads of each tensor the parts that its devices hold, straight to their
        place.

    Raises:
      FileNotFoundError: the folder, or a file of the checkpoint, is not there; or there is only a pickled one.
      ValueError: the checkpoint is damaged, does not fit its config.json or the head asked for, or is not supported.

    >>> import tempfile
    >>> from melora_jax.models.hub.save import save_pretrained
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     save_pretrained(model_from_config({"model_type": "bert", **sizes}, task="encoder"), f"{parent}/bert")
    ...     model = from_pretrained(f"{parent}/bert", num_labels=3)
    >>> model(jnp.array([[1, 2, 3]])).shape, model.load_report.initialised
    ((1, 3), ('classifier/bias', 'classifier/kernel'))
    """
    source = checkpoint_source(path_or_id)
    config, where = config_of(source)
    model = abstract_model(source, task=task, num_labels=num_labels, label_names=label_names, dtype=dtype, remat=remat)
    shapes = {path: tuple(variable.shape) for path, variable in variables_of(model).items()}
    request = Request(family=family_of(config, where), task=task, num_labels=model.num_labels, shapes=shapes)
    plan = load_plan(request, tensor_files(source), config.get("architectures") or (), source)
    placed = {} if mesh is None else shardings_of(model, mesh)
    _require_equal_copies(plan, DTYPES[dtype])
    values = _read(plan, DTYPES[dtype], shapes, placed)
    drawn = _drawn(plan, shapes, sizes_of(config, where).initializer_range, DTYPES[dtype], rngs or nnx.Rngs(0))
    values |= {path: put(value, placed[path]) if placed else value for path, value in drawn.items()}
    for path, variable in variables_of(model).items():
        variable.set_value(values[path])
    model.name_or_path = str(path_or_id)
    model.folder = str(source.resolve())
    model.load_report = LoadReport(
        files=tuple(sorted({file.name for file, _ in plan.sources.values()})),
        initialised=plan.initialised,
        ignored=plan.ignored,
    )
    _say(model.load_report, source)
    return model


def abstract_model(
    path_or_id: str | Path,
    *,
    task: str = "sequence-classification",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: str = "float32",
    remat: str = "none",
) -> Model:
    """The model of a checkpoint with shapes in place of arrays; of its files only config.json is read, or fetched.

    Arguments are those of `from_pretrained`.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the model is not supported, or labels contradict each other.

    >>> import json, tempfile
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=3, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ...     abstract_model(folder, task="causal-lm").model.norm.scale.shape
    (6,)
    """
    config, where = config_of(checkpoint_source(path_or_id, weights=False))
    return nnx.eval_shape(
        lambda: model_from_config(
            config, task=task, num_labels=num_labels, label_names=label_names, dtype=dtype, remat=remat, where=where
        )
    )


def variables_of(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Every variable of a model, of whatever type, by its path.

    >>> sorted(variables_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    ['bias', 'kernel']
    """
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}


def _read(
    plan: LoadPlan, dtype: jnp.dtype, shapes: Mapping[str, tuple[int, ...]], placed: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    values = {}
    for file in sorted({file for file, _ in plan.sources.values()}):
        with open_tensors(file) as tensors:
            for path, (held_in, key) in plan.sources.items():
                if held_in != file:
                    continue
                if placed:
                    values[path] = _read_parts(tensors, key, path, shapes[path], dtype, placed[path])
                else:
                    _, array = flax_from_torch(torch_name(path), tensors.read(key))
                    values[path] = jnp.asarray(array, dtype=dtype)
    return values


def _read_parts(
    tensors: TensorFile | GGUFTensors,
    key: str,
    path: str,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: NamedSharding,
) -> jax.Array:
    """One variable, of which each device's part is read by itself."""

    def part(index: Any) -> np.ndarray:
        stored = tensors.read_part(key, torch_shape(path, index))
        return np.ascontiguousarray(flax_from_torch(torch_name(path), stored)[1]).astype(dtype)

    return jax.make_array_from_callback(shape, sharding, part)


def _require_equal_copies(plan: LoadPlan, dtype: jnp.dtype) -> None:
    for path, (file, key) in plan.copies.items():
        own_file, own_key = plan.sources[path]
        with open_tensors(file) as tensors, open_tensors(own_file) as own:
            equal = np.array_equal(tensors.read(key).astype(dtype), own.read(own_key).astype(dtype))
        if not equal:
            raise ValueError(
                f"{key} in {file} differs from {torch_name(path)}, but config.json ties the two; set"
                " tie_word_embeddings to false there"
            )


def _drawn(
    plan: LoadPlan, shapes: Mapping[str, tuple[int, ...]], deviation: float, dtype: jnp.dtype, rngs: nnx.Rngs
) -> dict[str, jax.Array]:
    values = {}
    for path in plan.initialised:
        if path.endswith("/bias"):
            values[path] = jnp.zeros(shapes[path], dtype)
        else:
            values[path] = nnx.initializers.normal(deviation)(rngs.params(), shapes[path]).astype(dtype)
    return values


def _say(report: LoadReport, source: Path) -> None:
    if report.initialised:
        _log.warning("%s has no %s: drawn at random, train it before use", source, ", ".join(report.initialised))
    if report.ignored:
        _log.info("%s: left out %s", source, ", ".join(f"{name} ({reason})" for name, reason in report.ignored))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The model that a checkpoint is to fill.

    Attributes:
      family: the model's family.
      task: its task.
      num_labels: outputs of its classification head; None where it has none.
      shapes: shape of each variable, by path.
    """

    family: Family
    task: str
    num_labels: int | None
    shapes: Mapping[str, tuple[int, ...]]


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
    copies: dict[str, tuple[Path, str]] = dataclasses.field(default_factory=dict)


_HEAD, _EMBEDDING = "lm_head.weight", "model/embed_tokens/embedding"


def load_plan(request: Request, files: Mapping[str, Path], architectures: Sequence[str], where: Path) -> LoadPlan:
    """Matches the tensors of a checkpoint to the variables of a model.

    Args:
      request: the model.
      files: the file of each tensor.
      architectures: those in config.json; they tell whose head a `classifier` tensor is.
      where: the checkpoint's folder, for errors.

    Raises:
      ValueError: a body tensor is missing, a tensor is surplus or there twice, or a shape differs.
    """
    family, task = request.family, request.task
    paths = {torch_name(path): path for path in request.shapes}
    sources: dict[str, tuple[Path, str]] = {}
    ignored: list[tuple[str, str]] = []
    copies: dict[str, tuple[Path, str]] = {}
    surplus: dict[str, Path] = {}
    for key in sorted(files):
        name = family.canonical(key, task)
        if reason := family.ignorable(name, task, tuple(architectures)):
            ignored.append((key, reason))
        elif name not in paths and name == _HEAD and family.is_decoder:
            copies[_EMBEDDING] = (files[key], key)
            ignored.append((key, "tied to the embedding"))
        elif name not in paths:
            surplus[key] = files[key]
        elif paths[name] in sources:
            raise ValueError(f"{where} holds {sources[paths[name]][1]} and {key}, one tensor twice; remove one of them")
        else:
            sources[paths[name]] = (files[key], key)
    initialised = tuple(sorted(set(request.shapes) - set(sources)))
    _require_complete(request, sources, initialised, surplus, where)
    _require_shapes(request, sources)
    return LoadPlan(sources=sources, initialised=initialised, ignored=tuple(ignored), copies=copies)


def _top(family: Family, path: str) -> str:
    """The head module or "pooler" that a variable belongs to, or "" for the rest of the body."""
    first = path.removeprefix(f"{family.prefix}/").split("/")[0]
    return first if first in (*family.head, "pooler") else ""


def _require_complete(
    request: Request,
    sources: Mapping[str, tuple[Path, str]],
    initialised: Sequence[str],
    surplus: Mapping[str, Path],
    where: Path,
) -> None:
    partly_there = {_top(request.family, path) for path in sources} | {""}
    missing = [torch_name(path) for path in initialised if _top(request.family, path) in partly_there]
    if missing == [_HEAD]:
        raise ValueError(
            f"the checkpoint in {where} lacks {_HEAD}; where its embedding is its head too, set tie_word_embeddings to"
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
            f" {request.family.model_type} of its config.json has no place; check model_type and the sizes there"
        )


def _require_shapes(request: Request, sources: Mapping[str, tuple[Path, str]]) -> None:
    for file in sorted({file for file, _ in sources.values()}):
        with open_tensors(file) as tensors:
            for path, (held_in, key) in sources.items():
                if held_in == file:
                    _require_fits(request, path, key, tensors)


def _require_fits(request: Request, path: str, key: str, tensors: TensorFile | GGUFTensors) -> None:
    if not jnp.issubdtype(tensors.dtype(key), jnp.floating):
        raise ValueError(
            f"{key} in {tensors.path} is {tensors.dtype(key)}; quantised checkpoints are not supported,"
            " use the one they were made from"
        )
    stored, expected = tensors.shape(key), torch_shape(path, request.shapes[path])
    if stored == expected:
        return
    is_head = _top(request.family, path) in request.family.head
    if is_head and stored and stored[1:] == expected[1:] and expected[0] == request.num_labels:
        raise ValueError(_other_labels(key, tensors.path, stored[0], request))
    remedy = "correct the sizes in config.json, or fetch the checkpoint again"
    if path.endswith("embed_tokens/embedding") and stored[1:] == expected[1:]:
        remedy = f"its vocabulary is not that of config.json: if the tokenizer fits it, set vocab_size to {stored[0]}"
    raise ValueError(
        f"{key} in {tensors.path} has shape {list(stored)}, config.json asks for {list(expected)}; {remedy}"
    )


def _other_labels(key: str, file: Path, stored: int, request: Request) -> str:
    return (
        f"the head {key} in {file} has {stored} outputs, the {request.task} asked for has {request.num_labels};"
        f' load it with task="sequence-classification", num_labels={stored}, or start a fresh head from the body alone:'
        ' save_pretrained(from_pretrained(FOLDER, task="encoder"), BODY_FOLDER), then load BODY_FOLDER'
    )
