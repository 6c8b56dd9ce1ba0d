"""Tensors in torch and in Flax: their names and their layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

Size = TypeVar("Size")

_EMBEDDINGS = ("embeddings", "embed_tokens")


def torch_name(path: str) -> str:
    """The Hugging Face name of the tensor at a Flax path.

    Args:
      path: a variable's path, ending in `kernel`, `bias`, `scale` or `embedding`.

    Raises:
      ValueError: the path ends in something else, so torch has no tensor for it.

    >>> torch_name("bert/encoder/layer/3/attention/self/query/kernel")
    'bert.encoder.layer.3.attention.self.query.weight'
    """
    *modules, leaf = path.split("/")
    if leaf not in ("kernel", "bias", "scale", "embedding"):
        raise ValueError(f"{path} has no Hugging Face name; leaves are kernel, bias, scale or embedding")
    return ".".join([*modules, "bias" if leaf == "bias" else "weight"])


def torch_shape(path: str, shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The shape in torch, or slices, of the Flax variable at `path`: a dense `[d_in, d_out]` is stored `[d_out, d_in]`.

    >>> torch_shape("classifier/kernel", (384, 2))
    (2, 384)
    """
    return shape[::-1] if path.rpartition("/")[2] == "kernel" else shape


def torch_from_flax(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The Hugging Face name and array of a Flax variable.

    Args:
      path: the variable's path.
      array: its value; a dense kernel is `[d_in, d_out]`.

    Returns:
      The tensor's name, and the array in torch's layout: `[d_out, d_in]` for a dense kernel, else unchanged.

    Raises:
      ValueError: the path has no Hugging Face name, or the kernel is not a matrix.

    >>> name, weight = torch_from_flax("classifier/dense/kernel", np.zeros((3, 5)))
    >>> name, weight.shape
    ('classifier.dense.weight', (5, 3))
    """
    if path.rpartition("/")[2] != "kernel":
        return torch_name(path), array
    if array.ndim != 2:
        raise ValueError(f"{path} has shape {tuple(array.shape)}; a dense kernel is a matrix [d_in, d_out]")
    return torch_name(path), array.T


def flax_from_torch(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The Flax path and array of a Hugging Face tensor; the inverse of `torch_from_flax`.

    Args:
      name: the tensor's name, ending in `weight` or `bias`.
      array: its value. A vector `weight` is a norm's scale; a matrix is an embedding where its module is called
        `...embeddings` or `embed_tokens`, else a dense kernel.

    Raises:
      ValueError: the name ends in something else, or the array is neither vector nor matrix.

    >>> path, kernel = flax_from_torch("classifier.dense.weight", np.zeros((5, 3)))
    >>> path, kernel.shape
    ('classifier/dense/kernel', (3, 5))
    """
    *modules, leaf = name.split(".")
    stem = "/".join(modules)
    if leaf == "bias":
        return f"{stem}/bias", array
    if leaf != "weight" or array.ndim not in (1, 2):
        raise ValueError(f"{name} of shape {tuple(array.shape)} has no Flax path; give a weight or bias, 1-D or 2-D")
    if array.ndim == 1:
        return f"{stem}/scale", array
    if modules and modules[-1].endswith(_EMBEDDINGS):
        return f"{stem}/embedding", array
    return f"{stem}/kernel", array.T


def flax_part(path: str, read: Callable[[tuple[slice, ...]], np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of the Flax variable at `path`; `read` reads parts of its tensor in torch's layout.

    >>> weight = np.arange(6).reshape(2, 3)
    >>> flax_part("classifier/kernel", weight.__getitem__, (slice(1, 3), slice(0, 1))).tolist()
    [[1], [2]]
    """
    return flax_from_torch(torch_name(path), read(torch_shape(path, index)))[1]


def listed(names: Sequence[str]) -> str:
    """The first three names and how many more there are, for errors.

    >>> listed(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
