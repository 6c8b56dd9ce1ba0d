"""adapt for Linen models as people write them: own state and methods, subclasses, boxes, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze

import melora_jax as mj
from melora_jax import linen
from tests.library.linen.linen_hosts import EVERY, Block, Host, Scanned, X, adapted, flat_delta, stirred


class SharedScope(nn.Module):
    """A wrapper whose parameters are its layer's."""

    layer: nn.Module

    def setup(self) -> None:
        nn.share_scope(self, self.layer)

    def __call__(self, x: Any) -> Any:
        return self.layer(x) * 2


def test_a_layer_that_shares_its_scope_is_found() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return SharedScope(nn.Dense(10, name="inner"), name="outer")(x)

    module, both = adapted(Model())
    assert [site.path for site in module.adaptation.sites] == ["inner"]
    kernel = np.asarray(both["params"]["inner"]["kernel"]) + flat_delta(both["melora"]["inner"])
    np.testing.assert_allclose(module.apply(both, X), 2 * np.asarray(X) @ kernel, rtol=1e-4, atol=1e-5)


class Stateful(nn.Module):
    """Batch normalisation, the host's own dropout, and a second method."""

    def setup(self) -> None:
        self.first, self.norm = nn.Dense(6), nn.BatchNorm(momentum=0.5)
        self.dropout, self.second = nn.Dropout(0.5), nn.Dense(4)

    def __call__(self, x: Any, train: bool = False) -> Any:
        return self.second(self.dropout(self.hidden(x, train), deterministic=not train))

    def hidden(self, x: Any, train: bool = False) -> Any:
        return self.norm(self.first(x), use_running_average=not train)


def test_a_hosts_own_collections_rngs_and_methods_go_through() -> None:
    module, both = adapted(Stateful())
    y, changed = module.apply(both, X, train=True, rngs={"dropout": jax.random.key(7)}, mutable=["batch_stats"])
    assert sorted(changed) == ["batch_stats"]
    plain = module.merge(both)
    assert sorted(plain) == ["batch_stats", "params"]
    expected = Stateful().apply(plain, X, train=True, rngs={"dropout": jax.random.key(7)}, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected[0], rtol=1e-4, atol=1e-5)
    hidden = module.apply(both, X, method="hidden")
    np.testing.assert_allclose(hidden, Stateful().apply(plain, X, method="hidden"), rtol=1e-4, atol=1e-5)
    variables = {name: both[name] for name in plain}
    example = {"rngs": {"dropout": jax.random.key(7)}, "train": True}
    trained, _ = linen.adapt(Stateful(), variables, EVERY, jax.random.key(1), X, **example)
    assert trained.adaptation == module.adaptation
    part, _ = linen.adapt(Stateful(), variables, EVERY, jax.random.key(1), X, method="hidden")
    assert [site.path for site in part.adaptation.sites] == ["first"]


class Negated(nn.Dense):
    """A subclass that changes the input before its parent's method meets the kernel."""

    def __call__(self, inputs: Any, flip: bool = True) -> Any:
        return super().__call__(inputs=-inputs if flip else inputs)


def test_a_subclass_has_its_update_once_on_what_meets_the_kernel() -> None:
    module, both = adapted(Host(Negated(10)))
    kernel = np.asarray(both["params"]["layer"]["kernel"]) + flat_delta(both["melora"]["layer"])
    np.testing.assert_allclose(module.apply(both, X), -np.asarray(X) @ kernel, rtol=1e-4, atol=1e-5)


def test_flax_own_attention_and_other_names() -> None:
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.MultiHeadDotProductAttention(2, qkv_features=8)(nn.LayerNorm()(x), x)

    module, _ = adapted(Attention(), EVERY, X[None])
    names = ["query", "key", "value", "out"]
    assert [site.path for site in module.adaptation.sites] == [f"MultiHeadDotProductAttention_0/{n}" for n in names]


def test_layers_counts_the_numbers_that_linen_gives() -> None:
    class Stack(nn.Module):
        def setup(self) -> None:
            self.blocks = [Block() for _ in range(3)]

        def __call__(self, x: Any) -> Any:
            for block in self.blocks:
                x, _ = block(x)
            return x

    config = mj.MELoRAConfig(n=2, targets=["up"], layers=[0, 2])
    module, _ = adapted(Stack(), config)
    assert [site.path for site in module.adaptation.sites] == ["blocks_0/up", "blocks_2/up"]


def test_frozen_dicts_and_partitioned_kernels_come_back_as_they_were() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    model = Host(nn.Dense(10, kernel_init=init))
    variables = freeze({"params": {"unused": {}, **model.init(jax.random.key(0), X)["params"]}})
    module, melora = linen.adapt(model, variables, EVERY, jax.random.key(1), X)
    both = {**variables, "melora": freeze(stirred(melora))}
    merged = module.merge(both)
    assert jax.tree.structure(merged["params"]) == jax.tree.structure(variables["params"])
    assert merged["params"]["layer"]["kernel"].names == ("embed", "mlp")
    np.testing.assert_allclose(model.apply(merged, X), module.apply(both, X), rtol=1e-5, atol=1e-5)


def test_a_train_state_of_flax_holds_the_collection() -> None:
    from flax.training.train_state import TrainState

    model = Scanned(3)
    variables = model.init(jax.random.key(0), X)
    module, melora = linen.adapt(model, variables, EVERY, jax.random.key(1), X)
    state = TrainState.create(apply_fn=module.apply, params=melora, tx=optax.sgd(0.1))
    before = jax.tree.map(np.array, variables)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        gradient = jax.grad(lambda m: (state.apply_fn({**variables, "melora": m}, X) ** 2).mean())(state.params)
        return state.apply_gradients(grads=gradient)

    state = step(step(state))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.params))
    jax.tree.map(np.testing.assert_array_equal, variables, before)


class Branched(nn.Module):
    def setup(self) -> None:
        self.first, self.second = nn.Dense(6), nn.Dense(6)

    def __call__(self, x: Any, both: bool = False) -> Any:
        x = self.first(x)
        return self.second(x) if both else x


def test_a_layer_that_the_example_did_not_reach_is_not_left_out_in_silence() -> None:
    variables = Branched().init(jax.random.key(0), X, both=True)
    module, melora = linen.adapt(Branched(), variables, EVERY, jax.random.key(1), X)
    with pytest.raises(ValueError, match=r"^second is called here but not in the example call of adapt, so it has"):
        module.apply({**variables, "melora": melora}, X, both=True)
    named = mj.MELoRAConfig(n=2, targets=["first"])
    module, melora = linen.adapt(Branched(), variables, named, jax.random.key(1), X)
    y = module.apply({**variables, "melora": melora}, X, both=True)
    np.testing.assert_array_equal(y, Branched().apply(variables, X, both=True))


def test_what_is_no_flat_kernel_is_refused_with_the_reason() -> None:
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.DenseGeneral(4, batch_dims=(0,), name="batched")(x)
            z = nn.Einsum((5, 6, 4), "bd,bdk->bk", name="headed")(x)
            return nn.Conv(4, (3,), name="conv")(x) + y + z

    variables = Odd().init(jax.random.key(0), X)
    for name, reason in {
        "batched": "DenseGeneral with batch_dims=(0,) holds one kernel a batch entry, not one [d_in, d_out]",
        "headed": "Einsum 'bd,bdk->bk' has no flat kernel [d_in, d_out]: kernel label(s) ['b'] are neither summed nor "
        "new",
        "conv": "Conv has no dense kernel [d_in, d_out]; adaptable are Dense, DenseGeneral, Einsum and Embed",
    }.items():
        message = f"{name} can't be adapted: {reason}; leave it out with exclude={[name]}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            linen.adapt(Odd(), variables, mj.MELoRAConfig(n=1, targets=[name]), jax.random.key(0), X)


def test_an_einsum_that_is_called_in_two_ways_is_refused_if_they_use_the_kernel_differently() -> None:
    class Two(nn.Module):
        there: str
        back: str

        @nn.compact
        def __call__(self, x: Any) -> Any:
            einsum = nn.Einsum((6, 6), use_bias=False, name="mix")
            return einsum(x, self.there), einsum(x, self.back)

    config = mj.MELoRAConfig(n=2, targets=["mix"])

    def outputs(back: str) -> Any:
        model = Two("td,do->to", back)
        variables = model.init(jax.random.key(0), X)
        module, melora = linen.adapt(model, variables, config, jax.random.key(1), X)
        return module.apply({**variables, "melora": stirred(melora)}, X)

    there, back = outputs("td,do->ot")
    np.testing.assert_allclose(there, back.T, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"^Einsum at mix is called with 'to,do->td', which uses its kernel in another"
    ):
        outputs("to,do->td")


def test_variables_that_do_not_fit_are_refused_with_the_remedy() -> None:
    model = Scanned(2)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"^variables holds \['layers'\] and no 'params'; pass {'params': params}$"):
        linen.adapt(model, variables["params"], EVERY, jax.random.key(0), X)
    module, melora = linen.adapt(model, variables, EVERY, jax.random.key(0), X)
    both = {**variables, "melora": melora}
    with pytest.raises(ValueError, match=r"^mutable=\['params'\] would write to params, which stay as they are; name"):
        module.apply(both, X, mutable=["params"])
    with pytest.raises(ValueError, match=r"^layers/\w+ is a stack of 2 layers, .*; save the collection itself"):
        module.adapter_tree(melora)
    for use in (lambda v: module.apply(v, X), module.merge):
        with pytest.raises(ValueError, match=r"^variables holds \['params'\] and no 'melora'; pass "):
            use(variables)
        _, other = linen.adapt(Scanned(3), Scanned(3).init(jax.random.key(0), X), EVERY, jax.random.key(0), X)
        with pytest.raises(ValueError, match=r"layers/down/a is \[3, 2, 5, 2\] there and \[2, 2, 5, 2\] here; pass"):
            use({**variables, "melora": other})
