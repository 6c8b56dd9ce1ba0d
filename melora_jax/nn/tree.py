"""Walking and rewriting a Flax NNX object graph: any tree of modules, lists, dicts and tuples.

`path_of` alone turns a position in a tree into text, for matching, labels, errors and files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
from flax import nnx

Path = tuple[Any, ...]
Swap = Callable[[Path, Any], Any]


def path_of(keypath: Path) -> str:
    """A key path of JAX or NNX as `"encoder/layer/0/query/kernel"`.

    >>> path_of(("encoder", "layer", 0))
    'encoder/layer/0'
    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"a": [1]})
    >>> path_of(path)
    'a/0'
    """
    if keypath and isinstance(keypath[-1], jax.tree_util.GetAttrKey) and keypath[-1].name == "value":
        keypath = keypath[:-1]  # NNX adds it for the array in a variable
    return "/".join(_name_of(key) for key in keypath)


def without_base(path: str, sites: Collection[str] | None = None) -> str:
    """The path that a variable has without its adapter: a layer that wraps another holds it as `base`.

    Args:
      path: of the variable.
      sites: paths of the adapted layers, for models that may have modules of their own called `base`.

    >>> without_base("encoder/layer/0/query/base/kernel")
    'encoder/layer/0/query/kernel'
    >>> without_base("query/base/base/kernel", ["query"]), without_base("base/kernel", ["query"])
    ('query/base/kernel', 'base/kernel')
    """
    if sites is None:
        return path.replace("/base/", "/")
    site = next((site for site in sites if path.startswith(f"{site}/base/")), None)
    return path if site is None else site + path.removeprefix(f"{site}/base")


def _name_of(key: Any) -> str:
    return str(key) if isinstance(key, str | int) else jax.tree_util.keystr((key,), simple=True)


def children(node: Any) -> list[tuple[Any, Any]]:
    """The (key, child) pairs of a node that may hold modules or variables, in NNX's own order."""
    if isinstance(node, tuple):
        return list(zip(getattr(node, "_fields", range(len(node))), node, strict=True))
    if isinstance(node, nnx.List | list):
        return list(enumerate(node))
    if isinstance(node, nnx.Variable) or not isinstance(node, nnx.Pytree | dict):
        return []
    pairs = vars(node).items() if isinstance(node, nnx.Pytree) else node.items()
    return sorted(
        ((key, child) for key, child in pairs if not str(key).startswith("_pytree__")), key=lambda pair: str(pair[0])
    )


def walk(root: Any) -> Iterator[tuple[Path, Any]]:
    """Every module and variable below and including `root`, once for each path that leads to it.

    A shared module is yielded for each path, but entered only the first time. `nnx.iter_graph` yields it once, for its
    first path, so it can't tell what is shared.
    """
    entered: set[int] = set()

    def visit(path: Path, node: Any) -> Iterator[tuple[Path, Any]]:
        if isinstance(node, nnx.Pytree | nnx.Variable):
            yield path, node
        if id(node) not in entered:
            entered.add(id(node))
            for key, child in children(node):
                yield from visit((*path, key), child)

    return visit((), root)


def variables_of(node: Any) -> dict[str, nnx.Variable]:
    """Every variable of a module, of whatever type, by its path; a shared one once.

    >>> sorted(variables_of(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    ['bias', 'kernel']
    """
    return {path_of(path): variable for path, variable in nnx.to_flat_state(nnx.state(node))}


def rewrite(root: Any, swap: Swap) -> Any:
    """Replaces nodes in place: each is set to `swap(path, node)` wherever it stands.

    `swap` returns the node itself to keep it and enter it. It is called for each path, so for a shared node it must
    return the same replacement each time. Returns `root`, or its replacement. `nnx.recursive_map` returns a copy
    instead, and so can't keep a model in place.
    """
    entered: set[int] = set()

    def visit(path: Path, node: Any) -> Any:
        new = swap(path, node)
        if new is not node or id(node) in entered:
            return new
        entered.add(id(node))
        changed = {}
        for key, child in children(node):
            fresh = visit((*path, key), child)
            if fresh is not child:
                changed[key] = fresh
        return _with_children(node, changed)

    return visit((), root)


def _with_children(node: Any, changed: dict[Any, Any]) -> Any:
    """`node` with some children replaced: in place, or a new tuple."""
    if not changed:
        return node
    if isinstance(node, tuple):
        entries = [changed.get(key, child) for key, child in children(node)]
        return type(node)(*entries) if hasattr(node, "_fields") else type(node)(entries)
    for key, child in changed.items():
        if isinstance(node, nnx.Pytree) and not isinstance(node, nnx.List):
            setattr(node, key, child)
        else:
            node[key] = child
    return node
