"""Linen's own transforms around adapted layers: remat, scan, vmap, cond, jit, and layers that are shared."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import melora_jax as mj
from melora_jax import linen
from tests.library.linen.linen_hosts import EVERY, Block, Host, Scanned, X, adapted, flat_delta, stirred

pytestmark = pytest.mark.slow


class Unrolled(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for number in range(self.layers):
            x, _ = Block(name=str(number))(x)
        return x


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
