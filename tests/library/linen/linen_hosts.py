"""Small Linen hosts for the tests of linen, and what holds for any adapted one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import melora_jax as mj
from melora_jax import linen
from tests.support import reference

R, ALPHA = (1, 2), (3.0, 5.0)


def stirred(melora: Any, seed: int = 3) -> Any:
    """The collection with random values of a size that matters."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), melora)


def flat_delta(factors: Any, r: tuple[int, ...] = R, alpha: tuple[float, ...] = ALPHA) -> np.ndarray:
    a, b = np.asarray(factors["a"]), np.asarray(factors["b"])
    unpadded = [a[k, :, :rank] for k, rank in enumerate(r)], [b[k, :rank] for k, rank in enumerate(r)]
    return reference.delta(*unpadded, reference.scales(r, alpha, "mini"))


class Host(nn.Module):
    layer: nn.Module

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)


EVERY = mj.MELoRAConfig(n=2, r=(1, 2), alpha=(3.0, 5.0), targets="all-linear")


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


class Block(nn.Module):
    """Two dense layers with a residual, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        inner = nn.DenseGeneral((2, 5), name="up")(jnp.tanh(x))
        return x + nn.DenseGeneral(6, axis=(-2, -1), name="down")(inner), None


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
