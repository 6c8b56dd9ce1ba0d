"""Adapters for a dict of arrays, against NumPy."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import melora_jax as mj
from melora_jax import functional
from tests.support import reference

SHAPES = {"layer/0/query": (42, 30), "layer/1/query": (42, 30), "layer/1/out": (30, 18), "bias": (30,)}


def kernels(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {path: jnp.asarray(rng.normal(size=shape), dtype) for path, shape in SHAPES.items()}


def stirred(adapters: dict[str, functional.Adapter]) -> dict[str, functional.Adapter]:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), adapters)


def expected_delta(adapter: functional.Adapter, scaling: str, mixer: str) -> np.ndarray:
    a, b, r = np.asarray(adapter.a), np.asarray(adapter.b), adapter.spec.r
    factors = [a[k, :, :rank] for k, rank in enumerate(r)], [b[k, :rank] for k, rank in enumerate(r)]
    return reference.delta(*factors, reference.scales(r, adapter.spec.alpha, scaling), mixer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"n": 3, "r": (1, 4, 2), "alpha": (4.0, 8.0, 16.0)},
        {"n": 1, "r": 5, "scaling": "rslora"},
        {"n": 3, "r": 3, "mixer": "shuffle", "strategy": "batched"},
        {"n": 2, "r": 3, "mixer": "all", "scaling": "total"},
    ],
)
def test_apply_delta_and_merge_are_the_papers(changes: dict[str, Any]) -> None:
    config = mj.MELoRAConfig(targets=["query", "out"], exclude=["1.query"], **changes)
    base = kernels()
    adapters = functional.init(base, config, jax.random.key(0))
    assert list(adapters) == ["layer/0/query", "layer/1/out"]
    for path, adapter in adapters.items():
        assert not functional.apply(jnp.ones((2, SHAPES[path][0])), adapter).any()
    adapters = stirred(adapters)
    merged = functional.merge(base, adapters)
    assert list(merged) == list(base)
    x = np.random.default_rng(2).normal(size=(2, 5, 42)).astype(np.float32)
    for path, adapter in adapters.items():
        delta = expected_delta(adapter, config.scaling, config.mixer)
        inputs = x[..., : SHAPES[path][0]]
        np.testing.assert_allclose(functional.delta(adapter), delta, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.jit(functional.apply)(inputs, adapter), inputs @ delta, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(merged[path], np.asarray(base[path]) + delta, rtol=1e-5, atol=1e-5)
    for path in base.keys() - adapters.keys():
        assert merged[path] is base[path]


def test_the_start_is_that_of_the_linen_and_the_blocks_path_and_shapes_suffice() -> None:
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    few, every = (
        functional.init(shapes, mj.MELoRAConfig(n=3, r=2, targets=targets), jax.random.key(4))
        for targets in (["1.query"], "all-linear")
    )
    assert sorted(every) == ["layer/0/query", "layer/1/out", "layer/1/query"]
    np.testing.assert_array_equal(few["layer/1/query"].a, every["layer/1/query"].a)
    assert not np.array_equal(every["layer/0/query"].a, every["layer/1/query"].a)
    assert not every["layer/1/out"].b.any()


def test_a_bfloat16_kernel_keeps_its_dtype() -> None:
    base = kernels(jnp.bfloat16)
    adapters = stirred(functional.init(base, mj.MELoRAConfig(n=2, targets=["out"]), jax.random.key(0)))
    exact = np.asarray(base["layer/1/out"], np.float32) + np.asarray(functional.delta(adapters["layer/1/out"]))
    merged = functional.merge(base, adapters)["layer/1/out"]
    np.testing.assert_array_equal(merged, jnp.asarray(exact).astype(jnp.bfloat16))


def test_optax_trains_the_adapters_and_dropout_draws_inside_of_a_key() -> None:
    base, target = kernels(), np.random.default_rng(3).normal(size=(7, 30)).astype(np.float32)
    x = np.random.default_rng(2).normal(size=(7, 42)).astype(np.float32)
    adapters = functional.init(base, mj.MELoRAConfig(n=2, r=2, targets=["0.query"], dropout=0.3), jax.random.key(0))
    tx = optax.adam(1e-2)
    state = tx.init(adapters)

    @jax.jit
    def step(adapters: Any, state: Any) -> Any:
        def loss(adapters: Any) -> jax.Array:
            y = x @ base["layer/0/query"] + functional.apply(jnp.asarray(x), adapters["layer/0/query"])
            return ((y - target) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(30):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    still = functional.apply(jnp.asarray(x), adapters["layer/0/query"])
    with mj.dropout_key(jax.random.key(0)):
        assert not np.allclose(functional.apply(jnp.asarray(x), adapters["layer/0/query"]), still)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"targets": ["qery"]}, "targets: 'qery' matches no module; perhaps 'query'"),
    ({"targets": ["query"], "n": 4}, "n=4 does not divide d_in=42 at layer/0/query; choose n from 1, 2, 3, 6"),
    ({"targets": ["bias"]}, "bias can't be adapted: its shape [30] is not [d_in, d_out]; leave it out with exclude"),
    (
        {"targets": ["out"], "rank_pattern": {"query": 2}},
        "rank_pattern: 'query' matches no adapted layer; the first is",
    ),
    ({"targets": ["out"], "modules_to_save": ["bias"]}, "modules_to_save=['bias'] can't be kept in adapters; train"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        functional.init(kernels(), mj.MELoRAConfig(**({"n": 2} | changes)), jax.random.key(0))


def test_kernels_that_are_not_those_of_init_are_refused() -> None:
    base = kernels()
    adapters = functional.init(base, mj.MELoRAConfig(n=2, targets=["out"]), jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"^the adapter of layer/1/out is for a kernel \[30, 18\], which is absent; pass"
    ):
        functional.merge({"bias": base["bias"]}, adapters)
    with pytest.raises(ValueError, match=r"\[30, 18\], which is \[18, 30\]; pass"):
        functional.merge({"layer/1/out": base["layer/1/out"].T}, adapters)
