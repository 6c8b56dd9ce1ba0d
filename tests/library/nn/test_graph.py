"""Walking and rewriting: every kind of container, sharing, cycles; paths as NNX and JAX spell them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from melora_jax.nn.tree import path_of, rewrite, walk

pytestmark = pytest.mark.versions


class Leaf(nnx.Module):
    def __init__(self, name: str) -> None:
        self.name = name
        self.weight = nnx.Param(jnp.zeros(1))


class Pair(NamedTuple):
    left: Any
    right: Any


class Host(nnx.Module):
    """One leaf in each kind of container that NNX knows."""

    def __init__(self) -> None:
        self.direct = Leaf("direct")
        self.again = self.direct
        self.modules = nnx.List([Leaf(f"modules/{k}") for k in range(11)])
        self.named = nnx.Dict(x=Leaf("named/x"), y=3)
        self.plain_list = nnx.data([Leaf("plain_list/0"), None])
        self.plain_dict = nnx.data({"k": Leaf("plain_dict/k"), "f": jnp.tanh})
        self.plain_tuple = nnx.data((Leaf("plain_tuple/0"), 2.0))
        self.pair = nnx.data(Pair([Leaf("pair/left/0")], Leaf("pair/right")))
        self.chain = nnx.Sequential(Leaf("chain/layers/0"), nnx.relu)
        self.parent = nnx.data([self])


NAMES = [
    "direct",
    *(f"modules/{k}" for k in range(11)),
    "named/x",
    "plain_list/0",
    "plain_dict/k",
    "plain_tuple/0",
    "pair/left/0",
    "pair/right",
    "chain/layers/0",
]


def leaves(host: Host) -> dict[str, Leaf]:
    return {path_of(path): node for path, node in walk(host) if isinstance(node, Leaf)}


def test_every_leaf_is_reached_under_its_path_and_a_shared_one_under_each() -> None:
    found = leaves(Host())
    assert set(found) == {*NAMES, "again"}
    assert all(node.name == path for path, node in found.items() if path != "direct" and path != "again")
    assert found["direct"] is found["again"]


def test_the_inside_of_a_shared_module_comes_once_under_nnx_own_name() -> None:
    host = Host()
    weights = [path_of(path) for path, node in walk(host) if isinstance(node, nnx.Variable)]
    assert len(weights) == len(NAMES)
    assert set(weights) == {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(host))}


def test_rewriting_replaces_each_leaf_in_place_and_keeps_what_is_shared() -> None:
    host = Host()
    containers = {name: getattr(host, name) for name in ("modules", "named", "plain_list", "plain_dict", "chain")}
    fresh: dict[int, Leaf] = {}

    def swap(path: Any, node: Any) -> Any:
        return fresh.setdefault(id(node), Leaf(f"new {node.name}")) if isinstance(node, Leaf) else node

    old = leaves(host)
    assert rewrite(host, swap) is host
    new = leaves(host)
    assert list(new) == list(old)
    assert {path: node.name for path, node in new.items()} == {path: f"new {node.name}" for path, node in old.items()}
    assert host.direct is host.again
    assert host.parent[0] is host
    assert type(host.pair) is Pair
    assert type(host.plain_tuple) is tuple
    assert all(getattr(host, name) is container for name, container in containers.items())
    assert host.named.y == 3
    assert len(nnx.to_flat_state(nnx.state(host))) == len(NAMES)  # NNX still takes every container for data


def test_the_root_can_be_replaced() -> None:
    other = Leaf("other")
    assert rewrite(Leaf("root"), lambda path, node: other if isinstance(node, Leaf) else node) is other


def test_nothing_inside_a_replacement_is_visited() -> None:
    seen: list[str] = []

    def swap(path: Any, node: Any) -> Any:
        seen.append(path_of(path))
        return Leaf("new") if isinstance(node, Leaf) else node

    rewrite(nnx.List([Leaf("old")]), swap)
    assert seen == ["", "0"]


@pytest.mark.parametrize(
    "tree", [{"a": [1, (2, 3)]}, {"layer": {"0": {"kernel": 1}}}, nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))]
)
def test_paths_are_jax_own_without_the_value_that_nnx_adds(tree: Any) -> None:
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        spelled = jax.tree_util.keystr(path, simple=True, separator="/")
        assert path_of(path) == spelled.removesuffix("/value")
