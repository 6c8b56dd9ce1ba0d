"""adapt in hosts that we did not write: containers, own state, attention, types of their own, remat, convolutions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from tests.support import tiny

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
EVERY = mj.MELoRAConfig(n=2, r=1, targets="all-linear")


def linear(seed: int = 0, d_in: int = 6, d_out: int = 6) -> nnx.Linear:
    return nnx.Linear(d_in, d_out, rngs=nnx.Rngs(seed))


def config(*targets: str, **changes: Any) -> mj.MELoRAConfig:
    return mj.MELoRAConfig(n=2, r=1, targets=list(targets), **changes)


class Pair(NamedTuple):
    left: Any
    right: Any


class Containers(nnx.Module):
    """A layer in each kind of container."""

    def __init__(self) -> None:
        self.modules = nnx.List([linear(k) for k in range(2)])
        self.named = nnx.Dict(x=linear(2))
        self.chain = nnx.Sequential(linear(3), jnp.tanh, linear(4))
        self.plain: Any = nnx.data([linear(5), {"k": linear(6)}])
        self.pair = nnx.data(Pair(linear(7), (linear(8), "name")))

    def __call__(self, x: Any) -> Any:
        for layer in (*self.modules, self.named.x, self.chain, self.plain[0], self.plain[1]["k"], self.pair.left):
            x = x + layer(x)
        return self.pair.right[0](x)


def test_layers_in_every_container() -> None:
    adaptation = tiny.check_round_trip(Containers(), EVERY, X)
    assert [site.path for site in adaptation.sites] == [
        "chain/layers/0",
        "chain/layers/2",
        "modules/0",
        "modules/1",
        "named/x",
        "pair/left",
        "pair/right/0",
        "plain/0",
        "plain/1/k",
    ]


def test_a_module_list_as_root() -> None:
    model = nnx.List([linear(), linear(1)])
    mj.adapt(model, EVERY, rngs=nnx.Rngs(0))
    assert [type(layer) for layer in model] == [mj.MELoRADense] * 2
    assert [type(layer) for layer in mj.unwrap(model)] == [nnx.Linear] * 2


def test_a_container_that_can_not_be_looked_into_is_refused() -> None:
    @jax.tree_util.register_pytree_node_class
    class Box:
        def __init__(self, layer: Any) -> None:
            self.layer = layer

        def tree_flatten(self) -> Any:
            return (self.layer,), None

        @classmethod
        def tree_unflatten(cls, _: Any, children: Any) -> Any:
            return cls(*children)

    model: Any = nnx.Sequential(linear())
    model.box = nnx.data(Box(linear(1)))
    with pytest.raises(ValueError, match=r"^box/.* lies in a container that adapt can't look into; hold modules in"):
        mj.adapt(model, EVERY, rngs=nnx.Rngs(0))


class Stateful(nnx.Module):
    """A host with its own dropout, batch normalisation and stream of random numbers."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0, dropout=1)
        self.first, self.second = linear(), linear(1)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
        self.dropout: Any = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(self.dropout(self.norm(jnp.tanh(self.first(x)))))


def test_a_hosts_own_state_is_neither_trained_nor_frozen_and_moves_with_the_steps() -> None:
    model = Stateful()
    mj.adapt(model, EVERY, rngs=nnx.Rngs(1))
    groups: Any = nnx.split(model, nnx.Param, mj.FrozenParam, ...)
    kinds = {type(variable) for _, variable in nnx.to_flat_state(groups[3])}
    assert kinds == {nnx.BatchStat, nnx.RngCount, nnx.RngKey}
    tx = mj.make_optimizer(model, 1e-2)
    state, frozen = mj.train_state(model, tx)
    step = mj.make_train_step(model, tx, lambda model, batch: (model(batch) ** 2).mean())
    seen = []
    for _ in range(2):
        state, _ = step(state, frozen, X, jax.random.key(0))
        host = nnx.to_pure_dict(state.host)
        seen.append((int(host["dropout"]["rngs"]["count"]), np.asarray(host["norm"]["mean"])))
    assert [count for count, _ in seen] == [1, 2]
    mean = np.tanh(np.asarray(X) @ np.asarray(frozen["first"]["base"]["kernel"][...])).mean(0)
    np.testing.assert_allclose(seen[0][1], 0.5 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen[1][1], 0.75 * mean, rtol=0.1, atol=0.02)
    nnx.update(model, state.trainable, state.host)
    plain = mj.merge(model)
    assert int(plain.dropout.rngs.count[...]) == 2
    state, _ = step(state, frozen, X, jax.random.key(0))
    assert int(plain.dropout.rngs.count[...]) == 2  # donation deletes the model's arrays, not the merged copy's


class Attention(nnx.Module):
    def __init__(self) -> None:
        self.attention = nnx.MultiHeadAttention(2, 6, qkv_features=8, decode=False, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(6, rngs=nnx.Rngs(1))
        self.mix = nnx.Einsum("...td,de->...te", (6, 4), (4,), rngs=nnx.Rngs(2))

    def __call__(self, x: Any) -> Any:
        return self.mix(self.norm(x + self.attention(x)))


def test_flax_own_attention() -> None:
    adaptation = tiny.check_round_trip(Attention(), EVERY, X[None])
    assert [(site.path, site.d_in, site.d_out) for site in adaptation.sites] == [
        ("attention/key", 6, 8),
        ("attention/out", 8, 6),
        ("attention/query", 6, 8),
        ("attention/value", 6, 8),
        ("mix", 6, 4),
    ]


class Named(nnx.Linear):
    """A subclass with an attribute and a call of its own."""

    def __init__(self, name: str, rngs: nnx.Rngs) -> None:
        super().__init__(6, 6, rngs=rngs)
        self.name = name

    def __call__(self, inputs: Any, out_sharding: Any = None, *, flip: bool = False) -> Any:
        return super().__call__(-inputs if flip else inputs, out_sharding)


class Special(nnx.Param):
    """A host's own type of parameter."""


class Subclasses(nnx.Module):
    def __init__(self) -> None:
        self.first, self.second = Named("one", nnx.Rngs(0)), linear(1)
        self.second.kernel = Special(self.second.kernel[...], note="kept")
        self.gain = Special(jnp.ones(6))

    def __call__(self, x: Any) -> Any:
        return self.second(self.first(x, flip=False)) * self.gain[...]


def test_types_of_a_hosts_own_are_restored() -> None:
    tiny.check_round_trip(Subclasses(), EVERY, X)
    model = Subclasses()
    mj.adapt(model, EVERY, rngs=nnx.Rngs(1))
    assert model.first.name == "one"
    assert not jax.tree.leaves(nnx.state(model, Special))
    plain = mj.unwrap(model)
    assert type(plain.first) is Named
    assert (type(plain.second.kernel), type(plain.gain)) == (Special, Special)
    assert plain.second.kernel.note == mj.merge(model).second.kernel.note == "kept"


class Remat(nnx.Module):
    """A rematerialised block, called through nnx.jit as well."""

    def __init__(self) -> None:
        self.inner, self.outer = linear(), linear(1)

    @nnx.remat
    def block(self, x: Any) -> Any:
        return jnp.tanh(self.inner(x))

    @nnx.jit
    def head(self, x: Any) -> Any:
        return self.outer(x)

    def __call__(self: Any, x: Any) -> Any:
        return self.head(self.block(self.block(x)))


def test_modules_under_remat_and_jit_train_as_without() -> None:
    def trained(block: Any, head: Any) -> dict[str, np.ndarray]:
        model = Remat()
        mj.adapt(model, EVERY, rngs=nnx.Rngs(1))
        tiny.stirred(model)
        tx = mj.make_optimizer(model, 1e-2)
        state, frozen = mj.train_state(model, tx)

        def loss(model: Any, x: Any) -> Any:
            return (head(model, block(model, block(model, x))) ** 2).mean()

        step = mj.make_train_step(model, tx, loss)
        for _ in range(2):
            state, _ = step(state, frozen, X, jax.random.key(0))
        nnx.update(model, state.trainable)
        return tiny.arrays(model, nnx.Param)

    with_remat = trained(Remat.block, Remat.head)
    without = trained(lambda model, x: jnp.tanh(model.inner(x)), lambda model, x: model.outer(x))
    for path, value in with_remat.items():
        np.testing.assert_allclose(value, without[path], rtol=1e-4, atol=1e-5, err_msg=path)
    tiny.check_round_trip(Remat(), EVERY, X)


def test_a_convolution_that_is_named_is_an_error() -> None:
    model = nnx.Sequential(nnx.Conv(6, 6, (3,), rngs=nnx.Rngs(0)), linear())
    before = tiny.snapshot(model)
    with pytest.raises(
        ValueError, match=r"^layers/0 can't be adapted: Conv has no dense kernel .*exclude=\['layers/0'\]$"
    ):
        mj.adapt(model, config("0", "1"), rngs=nnx.Rngs(1))
    tiny.assert_as_before(model, before)
    assert [site.path for site in mj.adapt(model, EVERY, rngs=nnx.Rngs(1)).sites] == ["layers/1"]
