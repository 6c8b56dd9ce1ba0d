"""The probe of adapt: it finds adapters without effect, and leaves no trace."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from tests.support import tiny

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
EVERY = mj.MELoRAConfig(n=2, r=1, targets="all-linear")


def linear(seed: int) -> nnx.Linear:
    return nnx.Linear(6, 6, rngs=nnx.Rngs(seed))


class Bypass(nnx.Module):
    """A host that computes with one layer's kernel instead of calling it, and calls two others."""

    def __init__(self) -> None:
        self.fused, self.called = linear(0), linear(1)
        self.count = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x: Any, scale: Any = 1.0) -> Any:
        self.count[...] += 1
        y = self.called(x @ self.fused.kernel[...] * scale)
        return {"first": y, "second": (x, jnp.zeros(2) / 0)}


def test_a_host_that_reads_the_kernel_is_found_and_the_model_is_as_it_was() -> None:
    model = Bypass()
    before = tiny.snapshot(model)
    message = r"^the adapter at fused does not change the model's output: the model reads the layer's kernel instead"
    with pytest.raises(ValueError, match=message):
        mj.adapt(model, EVERY, rngs=nnx.Rngs(1), probe=X)
    tiny.assert_as_before(model, before)


@pytest.mark.parametrize("probe", [X, (X,), (X, jnp.ones(()))])
def test_a_probe_that_passes_leaves_factors_and_state_as_without(probe: Any) -> None:
    """NaN in the output, which is no change, is none here either."""
    probed, plain = Bypass(), Bypass()
    config = mj.MELoRAConfig(n=2, r=[1, 2], targets=["called"])
    mj.adapt(probed, config, rngs=nnx.Rngs(1), probe=probe)
    mj.adapt(plain, config, rngs=nnx.Rngs(1))
    tiny.assert_as_before(probed, tiny.snapshot(plain))


class Unused(nnx.Module):
    """Three layers, one of which is called."""

    def __init__(self) -> None:
        self.layers = nnx.List([linear(k) for k in range(3)])

    def __call__(self, x: Any) -> Any:
        return self.layers[1](x)


def test_every_site_without_effect_is_named() -> None:
    with pytest.raises(ValueError, match=r"^the adapter at layers/0, layers/2 does not change"):
        mj.adapt(Unused(), EVERY, rngs=nnx.Rngs(1), probe=X)


def test_without_a_probe_nothing_is_run() -> None:
    model = Bypass()
    mj.adapt(model, EVERY, rngs=nnx.Rngs(1))
    assert model.count[...] == 0
