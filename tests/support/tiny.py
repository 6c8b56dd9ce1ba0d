"""A small host model for the tests of surgery, training and files, and ways to compare two states of a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import melora_jax as mj
from melora_jax.adapters import Adaptation

VOCAB, WIDTH, INNER, LABELS = 13, 6, 10, 3
IDS = jnp.array([[1, 5, 2, 12], [7, 0, 3, 3]])


class Block(nnx.Module):
    """Two dense layers from the width to the inner size, and one back."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
        self.query: Any = nnx.Linear(WIDTH, INNER, param_dtype=dtype, rngs=rngs)
        self.value: Any = nnx.Linear(WIDTH, INNER, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(INNER, WIDTH, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.out(jnp.tanh(self.query(x)) * self.value(x))


class Encoder(nnx.Module):
    """An embedding, blocks in an nnx.List, and a linear classifier on the mean."""

    def __init__(self, seed: int = 0, layers: int = 2, dtype: Any = jnp.float32) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(VOCAB, WIDTH, param_dtype=dtype, rngs=rngs)
        self.layer = nnx.List([Block(rngs, dtype) for _ in range(layers)])
        self.classifier: Any = nnx.Linear(WIDTH, LABELS, param_dtype=dtype, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.layer:
            x = block(x)
        return self.classifier(x.mean(-2))


@nnx.jit
def run(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)


def config(**changes: Any) -> mj.MELoRAConfig:
    settings: dict[str, Any] = {"n": 2, "r": 1, "targets": ["query", "value"], "modules_to_save": ["classifier"]}
    return mj.MELoRAConfig(**(settings | changes))


def adapted(seed: int = 0, dtype: Any = jnp.float32, **changes: Any) -> Encoder:
    """An adapted encoder whose B are not zero."""
    model = Encoder(seed, dtype=dtype)
    mj.adapt(model, config(**changes), rngs=nnx.Rngs(1))
    return stirred(model)


def trained(**changes: Any) -> Encoder:
    """An adapted encoder whose factors and head are not those that it began with."""
    model = adapted(**changes)
    if isinstance(model.classifier.kernel, nnx.Param):
        model.classifier.kernel[...] *= 1.5
        model.classifier.bias[...] += 0.25
    return model


def stirred(model: Any, seed: int = 2) -> Any:
    """The model with random factors of a size that matters."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, mj.MELoRAParam)
    for _, variable in nnx.to_flat_state(state):
        variable[...] = jnp.asarray(rng.normal(size=variable.shape) * 0.3, jnp.float32)
    nnx.update(model, state)
    return model


def arrays(model: Any, kind: Any = ...) -> dict[str, np.ndarray]:
    """Every variable of a model as NumPy by path."""
    flat = nnx.to_flat_state(nnx.state(model, kind) if kind is not ... else nnx.state(model))
    return {"/".join(map(str, path)): _as_numpy(variable.get_raw_value()) for path, variable in flat}


def _as_numpy(value: Any) -> np.ndarray:
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.array(jax.random.key_data(value) if is_key else value)


def snapshot(model: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The structure and the arrays of a model, to compare with later."""
    return nnx.graphdef(model), arrays(model)


def assert_as_before(model: Any, before: tuple[Any, dict[str, np.ndarray]]) -> None:
    graphdef, values = before
    assert nnx.graphdef(model) == graphdef
    assert_equal(arrays(model), values)


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same paths, dtypes and bits."""
    assert list(one) == list(other)
    for path, value in one.items():
        assert value.dtype == other[path].dtype, path
        assert value.tobytes() == other[path].tobytes(), path


def check_round_trip(model: Any, config: mj.MELoRAConfig, *inputs: Any, start: float = 0) -> Adaptation:
    """Zero start, merge == adapted, unwrap == before, and each adapter moves the output."""
    before, y = snapshot(model), np.asarray(run(model, *inputs))
    adaptation = mj.adapt(model, config, rngs=nnx.Rngs(1), probe=inputs)
    np.testing.assert_allclose(run(model, *inputs), y, rtol=0, atol=start)
    stirred(model)
    moved = np.asarray(run(model, *inputs))
    assert abs(moved - y).max() > 1e-3
    np.testing.assert_allclose(run(mj.merge(model), *inputs), moved, rtol=2e-5, atol=2e-5)
    assert_as_before(mj.unwrap(model), before)
    return adaptation
