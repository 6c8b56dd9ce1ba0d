"""adapt for Linen models as people write them: remat, shared and scanned layers, vmap, jit, state, subclasses."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze
from test_linen import Host, flat_delta, stirred

import melora_jax as mj
from melora_jax import linen

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
EVERY = mj.MELoRAConfig(n=2, r=(1, 2), alpha=(3.0, 5.0), targets="all-linear")


class Block(nn.Module):
    """Two dense layers with a residual, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        inner = nn.DenseGeneral((2, 5), name="up")(jnp.tanh(x))
        return x + nn.DenseGeneral(6, axis=(-2, -1), name="down")(inner), None


class Unrolled(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for number in range(self.layers):
            x, _ = Block(name=str(number))(x)
        return x


class Scanned(nn.Module):
    layers: int
    axis: int = 0
    block: Any = Block

    @nn.compact
    def __call__(self, x: Any) -> Any:
        stack = nn.scan(
            self.block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.layers
        )
        return stack(name="layers")(x, None)[0]


def adapted(model: nn.Module, config: mj.MELoRAConfig = EVERY, *inputs: Any) -> Any:
    """The adapted module and its variables, with factors that are not zero; and the laws that hold for any of them."""
    inputs = inputs or (X,)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    module, melora = linen.adapt(model, variables, config, jax.random.key(1), *inputs)
    run, run_plain = (
        jax.jit(lambda variables, apply=part.apply: apply(variables, *inputs)) for part in (module, model)
    )
    y = run_plain(variables)
    np.testing.assert_array_equal(run({**variables, "melora": melora}), y)
    assert sum(leaf.size for leaf in jax.tree.leaves(melora)) >= module.adaptation.trainable
    both = {**variables, "melora": stirred(melora)}
    moved = run(both)
    assert abs(moved - y).max() > 1e-3
    plain = module.merge(both)
    assert jax.tree.structure(plain) == jax.tree.structure(variables)
    np.testing.assert_allclose(run_plain(plain), moved, rtol=2e-5, atol=2e-5)
    return module, both


def unstacked(tree: Any, axis: int, layers: int) -> dict[str, Any]:
    """A tree of stacked arrays as one tree a layer."""
    return {str(k): jax.tree.map(lambda leaf, k=k: jnp.take(leaf, k, axis), tree) for k in range(layers)}


# Sizes of the stack that are also sizes of the kernels, where a wrong axis could pass unseen.
@pytest.mark.parametrize(("axis", "layers"), [(0, 3), (1, 6), (-1, 1)])
def test_scanned_layers_are_the_unrolled_ones(axis: int, layers: int) -> None:
    module, both = adapted(Scanned(layers, axis, nn.remat(Block)))
    assert [(site.path, site.parameters) for site in module.adaptation.sites] == [
        ("layers/up", layers * 3 * (3 + 5)),
        ("layers/down", layers * 3 * (5 + 3)),
    ]
    plain, _ = linen.adapt(
        Unrolled(layers), {"params": unstacked(both["params"]["layers"], axis, layers)}, EVERY, jax.random.key(1), X
    )
    apart = {name: unstacked(both[name]["layers"], axis, layers) for name in ("params", "melora")}

    def output_and_gradient(module: Any, variables: Any) -> Any:
        def loss(melora: Any) -> Any:
            y = module.apply({**variables, "melora": melora}, X)
            return (y**2).sum(), y

        gradient, y = jax.jit(jax.grad(loss, has_aux=True))(variables["melora"])
        return y, gradient

    (ours, gradient), (theirs, expected) = output_and_gradient(module, both), output_and_gradient(plain, apart)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    gradient = unstacked(gradient["layers"], axis, layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), gradient, expected)


def test_each_layer_of_a_stack_starts_with_values_of_its_own() -> None:
    model = Scanned(3)
    variables = model.init(jax.random.key(0), X)
    _, melora = linen.adapt(model, variables, EVERY, jax.random.key(1), X)
    a = np.asarray(melora["layers"]["up"]["a"])
    assert a.shape == (3, 2, 3, 2)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not np.isclose(a[one, :, :, 0], a[other, :, :, 0]).any()
    assert (a[:, 0, :, 1] == 0).all()  # the padding of the narrower mini
    assert abs(a).max() <= 1 / np.sqrt(3)


def test_each_layer_of_a_stack_drops_by_a_mask_of_its_own() -> None:
    """With equal factors and equal weights, the layers' updates differ by their masks alone."""

    class Branches(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def body(dense: Any, carry: Any, _: Any) -> Any:
                return carry, dense(x)

            scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(nn.Dense(10, name="dense"), jnp.zeros(()), None)[1]

    config = mj.MELoRAConfig(n=2, targets=["dense"], dropout=0.5)
    module, both = adapted(Branches(), config)
    same = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), both)

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        with mj.dropout_key(key):
            return module.apply(same, X)

    y = np.asarray(run(jax.random.key(3)))
    assert not np.isclose(y[0], y[1]).all()
    assert not np.isclose(y[1], y[2]).all()
    np.testing.assert_array_equal(run(jax.random.key(3)), y)
    assert not np.array_equal(run(jax.random.key(4)), y)
    still = np.asarray(module.apply(same, X))
    np.testing.assert_array_equal(still[0], still[1])


class Shared(nn.Module):
    """One layer that is called twice, under remat, and one that is passed in."""

    tail: nn.Module

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = nn.remat(nn.Dense)(6, name="layer")
        return self.tail(layer(jnp.tanh(layer(x))))


def test_a_shared_layer_has_one_adapter_at_both_calls() -> None:
    module, both = adapted(Shared(nn.Dense(4)))
    assert [site.path for site in module.adaptation.sites] == ["layer", "tail"]
    kernels = {
        name: np.asarray(both["params"][name]["kernel"]) + flat_delta(both["melora"][name])
        for name in ("layer", "tail")
    }
    expected = np.tanh(np.asarray(X) @ kernels["layer"]) @ kernels["layer"] @ kernels["tail"]
    np.testing.assert_allclose(module.apply(both, X), expected, rtol=1e-4, atol=1e-5)


def test_a_shared_layer_drops_by_another_mask_at_its_second_call() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Dense(6, name="layer")
            return layer(x), layer(x)

    variables = Twice().init(jax.random.key(0), X)
    config = mj.MELoRAConfig(n=2, targets=["layer"], dropout=0.5)
    module, melora = linen.adapt(Twice(), variables, config, jax.random.key(1), X)
    with mj.dropout_key(jax.random.key(2)):
        first, second = module.apply({**variables, "melora": stirred(melora)}, X)
    assert not np.array_equal(first, second)


class Ensemble(nn.Module):
    """Four copies of a scanned stack, by vmap over both."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        vmapped = nn.vmap(Scanned, variable_axes={"params": 1}, split_rngs={"params": True}, in_axes=None, axis_size=4)
        return vmapped(3, name="members")(x)


def test_nested_transforms() -> None:
    module, both = adapted(Ensemble())
    assert both["params"]["members"]["layers"]["up"]["kernel"].shape == (3, 4, 6, 2, 5)
    assert both["melora"]["members"]["layers"]["up"]["a"].shape == (3, 4, 2, 3, 2)
    member = {name: jax.tree.map(lambda leaf: leaf[:, 2], both[name]["members"]) for name in ("params", "melora")}
    one, _ = linen.adapt(Scanned(3), member, EVERY, jax.random.key(1), X)
    np.testing.assert_allclose(jax.jit(module.apply)(both, X)[2], jax.jit(one.apply)(member, X), rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """A layer type that is transformed itself, and one with an axis in its kernel that no adapter has."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=6, in_axes=None)
        return experts(10, name="experts")(x)


def test_a_transformed_layer_type_has_an_adapter_for_each_copy() -> None:
    module, both = adapted(Experts())
    (site,) = module.adaptation.sites
    assert (site.path, site.d_in, site.d_out, site.parameters) == ("experts", 6, 10, 6 * 3 * (3 + 5))
    factors = both["melora"]["experts"]
    for k in range(6):
        kernel = both["params"]["experts"]["kernel"][k] + flat_delta(jax.tree.map(lambda leaf, k=k: leaf[k], factors))
        np.testing.assert_allclose(module.apply(both, X)[k], np.asarray(X) @ kernel, rtol=1e-4, atol=1e-5)


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


def test_a_branch_under_cond() -> None:
    class Conditional(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layer = nn.Dense(6, name="layer")
            if self.is_mutable_collection("params"):
                return layer(x)
            return nn.cond(x.sum() > 1e6, lambda module, x: -x, lambda module, x: module(x), layer, x)

    _, both = adapted(Conditional())
    assert both["melora"]["layer"]["a"].shape == (2, 3, 2)


def test_a_kernel_that_a_transform_makes_of_another_is_refused() -> None:
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            def turned(tree: Any) -> Any:
                return jax.tree.map(lambda leaf: leaf.T, tree)

            dense = nn.map_variables(nn.Dense, "params", turned, turned, init=self.is_initializing(), mutable=True)
            return dense(10, use_bias=False, name="layer")(x)

    variables = Mapped().init(jax.random.key(0), X)
    message = r"^layer can't be adapted: a transform around it makes its kernel \[6, 10\] of params' \[10, 6\]; leave"
    with pytest.raises(ValueError, match=message):
        linen.adapt(Mapped(), variables, EVERY, jax.random.key(1), X)


def test_weights_that_a_scan_broadcasts_have_one_adapter() -> None:
    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=3)
            return scan(name="layers")(x, None)[0]

    _, both = adapted(Repeated())
    assert both["melora"]["layers"]["up"]["a"].shape == (2, 3, 2)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.jit(Host)(nn.Dense(10), name="host")(x)


def test_a_jitted_part_follows_the_config_that_is_applied() -> None:
    """Both configs have the same arrays: a cache that knew arrays alone would give the first one's output twice."""
    outputs = []
    for alpha in (4.0, 12.0):
        module, both = adapted(Jitted(), mj.MELoRAConfig(n=2, alpha=alpha, targets="all-linear"))
        outputs.append(np.asarray(module.apply(both, X)) - np.asarray(Jitted().apply({"params": both["params"]}, X)))
    np.testing.assert_allclose(outputs[1], 3 * outputs[0], rtol=1e-4, atol=1e-5)


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
    with pytest.raises(ValueError, match=r"^second is called here and was not in the example call of adapt, so it has"):
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
