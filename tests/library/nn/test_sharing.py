"""Layers that stand in a model twice, and variables that two layers share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from tests.support import tiny

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)


def linear(seed: int = 0) -> nnx.Linear:
    return nnx.Linear(6, 6, rngs=nnx.Rngs(seed))


def config(*targets: str, **changes: Any) -> mj.MELoRAConfig:
    return mj.MELoRAConfig(n=2, r=1, targets=list(targets), **changes)


class Shared(nnx.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        self.first = linear()
        self.second = self.first
        self.last = linear(1)

    def __call__(self, x: Any) -> Any:
        return self.last(jnp.tanh(self.second(jnp.tanh(self.first(x)))))


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_shared_layer_is_one_site_under_either_name(name: str) -> None:
    model = Shared()
    adaptation = tiny.check_round_trip(model, config(name, rank_pattern={name: 3}), X)
    assert [(site.path, site.r) for site in adaptation.sites] == [("first", (3, 3))]
    assert model.first is model.second
    assert adaptation.adapter == 3 * (6 + 6)
    plain = mj.merge(model)
    assert plain.first is plain.second


def test_a_shared_layers_gradient_is_the_sum_over_its_calls() -> None:
    model = Shared()
    mj.adapt(model, config("first"), rngs=nnx.Rngs(1))
    tiny.stirred(model)
    apart = nnx.clone(model)
    apart.second = nnx.clone(apart.first)

    @nnx.jit
    def gradient(model: Any) -> Any:
        return nnx.grad(lambda model: (model(X) ** 2).sum())(model)

    together, separate = gradient(model), gradient(apart)
    for factor in ("a", "b"):
        total = separate["first"][factor][...] + separate["second"][factor][...]
        np.testing.assert_allclose(together["first"][factor][...], total, rtol=1e-5, atol=1e-5)


class Tied(nnx.Module):
    """An embedding that is the output layer too, and a kernel that two layers share."""

    def __init__(self) -> None:
        self.embed = nnx.Embed(10, 6, rngs=nnx.Rngs(0))
        self.inner: Any = linear(1)
        self.twin = linear(2)
        self.twin.kernel = self.inner.kernel

    def __call__(self, ids: Any) -> Any:
        return self.embed.attend(self.twin(jnp.tanh(self.inner(self.embed(ids)))))


def test_tied_variables_stay_one_through_adapt_and_unwrap() -> None:
    model, ids = Tied(), jnp.array([[0, 9, 4]])
    adaptation = tiny.check_round_trip(model, config("embed", "inner"), ids)
    assert model.twin.kernel is model.inner.base.kernel
    assert adaptation.frozen == 10 * 6 + 6 * 6 + 2 * 6
    plain = mj.unwrap(model)
    assert plain.twin.kernel is plain.inner.kernel


def test_merging_unties_the_adapted_layer_from_the_other() -> None:
    model = Tied()
    before = np.asarray(model.twin.kernel[...])
    mj.adapt(model, config("inner"), rngs=nnx.Rngs(1))
    merged = mj.merge(tiny.stirred(model))
    assert merged.twin.kernel is not merged.inner.kernel
    np.testing.assert_array_equal(merged.twin.kernel[...], before)
    assert not np.array_equal(merged.inner.kernel[...], before)


def test_saving_one_half_of_a_tie_is_refused() -> None:
    model = Tied()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"^modules_to_save would train inner/kernel, .* as twin/kernel in the frozen"):
        mj.adapt(model, config("embed", modules_to_save=["inner"]), rngs=nnx.Rngs(1))
    tiny.assert_as_before(model, before)
    mj.adapt(model, config("embed", modules_to_save=["inner", "twin"]), rngs=nnx.Rngs(1))
    assert model.twin.kernel is model.inner.kernel
    assert mj.describe(model).head == 36 + 12
