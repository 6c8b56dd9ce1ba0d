"""Which tensor of a checkpoint fills which variable; every mismatch is found here, before a tensor is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp

from melora_jax.files.safetensors_io import TensorFile
from melora_jax.models.gguf.tensors import GGUFTensors
from melora_jax.models.hub.checkpoint import open_tensors
from melora_jax.models.hub.names import Family, listed, torch_name, torch_shape


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
