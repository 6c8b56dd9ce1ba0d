"""Collections of Linen variables as flat dicts, and paths in them as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import traverse_util
from flax.core import unfreeze

Path = tuple[str, ...]
Flat = dict[Path, Any]


def flat_from_tree(tree: Mapping[str, Any]) -> Flat:
    """The leaves and empty nodes of a collection by path."""
    return traverse_util.flatten_dict(unfreeze(dict(tree)), keep_empty_nodes=True)


def tree_from_flat(flat: Flat) -> dict[str, Any]:
    """The inverse of `flat_from_tree`."""
    return traverse_util.unflatten_dict(flat)


def joined(path: Path) -> str:
    """A path as `"layer_0/query"`."""
    return "/".join(path)


def parts(path: str) -> Path:
    """The inverse of `joined`."""
    return tuple(path.split("/")) if path else ()


def is_inside(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is that of one of the modules or lies below it."""
    return any(path == module or path.startswith(f"{module}/") for module in modules)


def size_of(flat: Flat) -> int:
    """The number of parameters in a flat collection."""
    return sum(leaf.size for leaf in jax.tree.leaves(flat))
