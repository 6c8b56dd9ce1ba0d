"""The mathematics against tests/reference.py: forward, gradients, mixers, start values, padding, embeddings."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melora_jax.config import AdapterSpec
from melora_jax.core import blocks, initializers
from melora_jax.core.products import latents
from melora_jax.core.products.plan import choose_strategy
from tests.support import reference

pytestmark = pytest.mark.versions


class Case(NamedTuple):
    d_in: int
    d_out: int
    r: tuple[int, ...]
    mixer: Any = "identity"

    @property
    def n(self) -> int:
        return len(self.r)

    def spec(self, scaling: Any = "mini", **changes: Any) -> AdapterSpec:
        alpha = tuple(3.0 + 2.0 * k for k in range(self.n))
        return AdapterSpec(n=self.n, r=self.r, alpha=alpha, scaling=scaling, mixer=self.mixer, **changes)


CASES = [
    Case(7, 5, (3,)),
    Case(6, 10, (1, 1)),
    Case(21, 15, (1, 2, 3)),
    Case(35, 10, (1, 1, 1, 1, 1)),
    Case(21, 15, (2, 2, 2), "all"),
    Case(6, 10, (4, 4), "shuffle"),
    Case(21, 15, (3, 3, 3), "shuffle"),
]
cases = st.sampled_from(CASES)
methods = st.sampled_from(["batched", "packed"])
scalings = st.sampled_from(["mini", "total", "rslora"])
batches = st.sampled_from([(), (4,), (2, 3)])
seeds = st.integers(0, 2**32 - 1)

apply = jax.jit(latents.apply, static_argnames=("mixer", "strategy"))
delta = jax.jit(blocks.delta, static_argnames="mixer")
packed_factors = jax.jit(blocks.packed_factors, static_argnames="mixer")
init_factors = jax.jit(initializers.init_factors, static_argnums=(1, 2, 3))


def drawn(case: Case, batch: tuple[int, ...], seed: int) -> tuple[np.ndarray, Any, Any]:
    """An input, and factors as the oracle has them."""
    x = np.random.default_rng(seed).normal(size=(*batch, case.d_in)).astype(np.float32)
    return x, *reference.generic_factors(seed, case.d_in, case.d_out, case.r)


@functools.partial(jax.jit, static_argnames=("mixer", "strategy"))
def gradients(x: Any, a: Any, b: Any, scale: Any, mixer: Any, strategy: Any, weight: Any) -> Any:
    def loss(x: Any, a: Any, b: Any) -> Any:
        return (latents.apply(x, a, b, scale, mixer, strategy).astype(jnp.float32) * weight).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(x, a, b)


def exact_gradients(case: Case, x: np.ndarray, a: Any, b: Any, s: Any, weight: np.ndarray) -> list[np.ndarray]:
    """The gradients of Σ weight·(x ΔW), in float64, padded with the zeros that padding must get."""
    left = reference.block_diagonal(a) @ np.diag(np.repeat(s, case.r)) @ reference.mixer_matrix(case.mixer, case.r)
    right = reference.block_diagonal(b)
    flat_x, flat_weight = x.reshape(-1, case.d_in), weight.reshape(-1, case.d_out)
    whole_b = left.T @ flat_x.T @ flat_weight
    mixed = (np.diag(np.repeat(s, case.r)) @ reference.mixer_matrix(case.mixer, case.r) @ right).T
    whole_a = flat_x.T @ flat_weight @ mixed
    grad_a, grad_b = (np.zeros_like(block, np.float64) for block in reference.padded(a, b))
    i, o, at = case.d_in // case.n, case.d_out // case.n, 0
    for k, rank in enumerate(case.r):
        grad_a[k, :, :rank] = whole_a[k * i : (k + 1) * i, at : at + rank]
        grad_b[k, :rank] = whole_b[at : at + rank, k * o : (k + 1) * o]
        at += rank
    return [weight @ (left @ right).T, grad_a, grad_b]


def assert_close(actual: Any, expected: np.ndarray, relative: float) -> None:
    """Within `relative` of the largest entry."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=relative * abs(expected).max())


@settings(max_examples=40)
@given(cases, methods, scalings, batches, seeds)
def test_apply_is_the_input_times_the_update(case: Case, method: Any, scaling: str, batch: Any, seed: int) -> None:
    x, a, b = drawn(case, batch, seed)
    spec = case.spec(scaling)
    s = reference.scales(case.r, spec.alpha, scaling)
    y = apply(x, *reference.padded(a, b), blocks.scale_of(spec), case.mixer, method)
    assert_close(y, x @ reference.delta(a, b, s, case.mixer), 1e-5)
    if case.mixer == "identity":
        assert_close(y, reference.melora(x, a, b, s), 1e-5)


@settings(max_examples=30)
@given(cases, methods, seeds)
def test_gradients_are_exact_and_zero_in_the_padding(case: Case, method: Any, seed: int) -> None:
    x, a, b = drawn(case, (2, 3), seed)
    spec = case.spec()
    weight = np.random.default_rng(seed + 1).normal(size=(2, 3, case.d_out)).astype(np.float32)
    expected = exact_gradients(case, x, a, b, spec.scales, weight)
    actual = gradients(x, *reference.padded(a, b), blocks.scale_of(spec), case.mixer, method, weight)
    for ours, exact in zip(actual, expected, strict=True):
        assert_close(ours, exact, 1e-5)
    unused = blocks.scale_of(spec) == 0
    assert not np.asarray(actual[1]).swapaxes(1, 2)[unused].any()
    assert not np.asarray(actual[2])[unused].any()


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6]])
def test_bfloat16_is_as_near_as_its_digits_allow(case: Case) -> None:
    exact_x, *exact = drawn(case, (4,), 3)
    rounded = [jnp.asarray(value, jnp.bfloat16) for value in (exact_x, *reference.padded(*exact))]
    x, a, b = (np.asarray(value, np.float32) for value in rounded)
    spec = case.spec()
    for method in ("batched", "packed"):
        y = apply(*rounded, blocks.scale_of(spec), case.mixer, method)
        assert y.dtype == jnp.bfloat16
        unpadded = [a[k, :, :rank] for k, rank in enumerate(case.r)], [b[k, :rank] for k, rank in enumerate(case.r)]
        assert_close(y, x @ reference.delta(*unpadded, spec.scales, case.mixer), 3 * 2.0**-8)


@given(cases, seeds)
def test_mix_is_the_mixers_matrix(case: Case, seed: int) -> None:
    z = np.random.default_rng(seed).normal(size=(2, case.n, max(case.r))).astype(np.float32)
    equal = (max(case.r),) * case.n
    expected = (z.reshape(2, -1) @ reference.mixer_matrix(case.mixer, equal)).reshape(z.shape)
    np.testing.assert_allclose(blocks.mix(jnp.asarray(z), case.mixer), expected, rtol=1e-6, atol=1e-6)


@given(cases, scalings)
def test_delta_and_plain_factors_are_the_update(case: Case, scaling: str) -> None:
    _, a, b = drawn(case, (), 5)
    spec = case.spec(scaling)
    stacked = [jnp.asarray(value) for value in reference.padded(a, b)]
    expected = reference.delta(a, b, reference.scales(case.r, spec.alpha, scaling), case.mixer)
    assert_close(delta(*stacked, blocks.scale_of(spec), case.mixer), expected, 1e-6)
    left, right = packed_factors(*stacked, blocks.scale_of(spec), case.mixer)
    width = case.r[0] if case.mixer == "all" else case.n * max(case.r)
    assert (left.shape, right.shape) == ((case.d_in, width), (width, case.d_out))
    assert_close(np.asarray(left, np.float64) @ np.asarray(right, np.float64), expected, 1e-6)


def test_the_update_is_linear_in_b() -> None:
    case = CASES[2]
    x, a, b = drawn(case, (4,), 7)
    stacked_a, one = reference.padded(a, b)
    other = np.random.default_rng(8).normal(size=one.shape).astype(np.float32)
    scale = blocks.scale_of(case.spec())
    parts = [np.asarray(apply(x, stacked_a, value, scale)) for value in (one, other, one - 3 * other)]
    np.testing.assert_allclose(parts[2], parts[0] - 3 * parts[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("mixer", "width"), [("identity", 1), ("shuffle", 1), ("all", 5)])
def test_a_starts_uniform_within_one_over_root_fan_in_and_b_at_zero(mixer: Any, width: int) -> None:
    spec = AdapterSpec(n=5, r=(10,) * 5, alpha=(1.0,) * 5, mixer=mixer)
    a, b = init_factors(jax.random.key(0), 5 * 97, 5 * 7, spec)
    bound = 1 / math.sqrt(97 * width)
    assert (a.shape, a.dtype, b.shape, b.dtype) == ((5, 97, 10), jnp.float32, (5, 10, 7), jnp.float32)
    assert 0.99 * bound < abs(np.asarray(a)).max() <= bound
    assert np.asarray(a).var() == pytest.approx(bound**2 / 3, rel=0.05)
    assert abs(np.asarray(a).mean()) < 0.03 * bound
    assert len(np.unique(np.asarray(a))) > 0.99 * a.size
    assert not b.any()


def test_gaussian_start_has_deviation_one_over_r() -> None:
    spec = AdapterSpec(n=3, r=(4, 4, 4), alpha=(1.0,) * 3, init="gaussian")
    a, b = init_factors(jax.random.key(1), 3 * 997, 3, spec)
    assert np.asarray(a).std() == pytest.approx(1 / 4, rel=0.02)
    assert abs(np.asarray(a)).max() > 3 / 4
    assert not b.any()


def test_narrower_minis_start_with_zeros_in_their_padding() -> None:
    spec = AdapterSpec(n=3, r=(1, 2, 3), alpha=(1.0,) * 3)
    a, _ = init_factors(jax.random.key(2), 21, 15, spec)
    used = np.arange(3) < np.array([[1], [2], [3]])
    np.testing.assert_array_equal(np.asarray(a != 0).all(1), used)
    np.testing.assert_array_equal(blocks.scale_of(spec) != 0, used)


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[6]])
def test_an_embedding_is_the_one_hot_product(case: Case) -> None:
    _, a, b = drawn(case, (), 9)
    stacked_a, stacked_b = (jnp.asarray(value) for value in reference.padded(a, b))
    scale = blocks.scale_of(case.spec())
    ids = np.array([[0, case.d_in - 1, 3], [-1, -case.d_in, 2]])
    keep = np.array([[1, 0, 2], [1, 2, 0]], np.float32)
    expected = np.eye(case.d_in)[ids] @ reference.delta(a, b, case.spec().scales, case.mixer)

    @jax.jit
    def embedded(kept: Any) -> Any:
        return latents.expand(
            latents.look_up(jnp.asarray(ids), stacked_a, kept), stacked_b, scale, case.mixer, "batched"
        )

    for weight in (np.ones_like(keep), keep):
        np.testing.assert_allclose(embedded(weight), expected * weight[..., None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["packed", "batched"])
def test_gradients_sum_over_one_axis_of_rows(strategy: Any) -> None:
    """Over two, XLA on CPU lays the input out anew and computes again, entry by entry, what it came from."""
    x, a, b = jnp.ones((2, 5, 6)), jnp.ones((3, 2, 7)), jnp.ones((3, 7, 4))

    def value(x: Any, a: Any, b: Any) -> Any:
        return (latents.apply(x, a, b, np.ones((3, 7), np.float32), strategy=strategy) ** 2).sum()

    jaxpr = jax.make_jaxpr(jax.grad(value, (0, 1, 2)))(x, a, b)
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert len(products) == 6
    for product in products:
        contracted, _ = product.params["dimension_numbers"]
        assert len(contracted[0]) == 1


def test_auto_takes_packed_while_the_latents_fit_one_wide_product() -> None:
    assert choose_strategy("auto", 32, 1, "cpu") == choose_strategy("auto", 4, 8, "cpu") == "packed"
    assert choose_strategy("auto", 33, 1, "cpu") == "batched"
    assert choose_strategy("auto", 2, 64, "tpu") == "packed"
    assert choose_strategy("auto", 129, 1, "gpu") == "batched"
    assert choose_strategy("batched", 1, 1, "cpu") == "batched"
    assert choose_strategy("auto", 1, 1, "cpu", True) == "packed"
    assert choose_strategy("auto", 2, 1, "cpu", True) == "merged"
    assert choose_strategy("auto", 129, 1, "gpu", True) == "batched"  # not measured there


def test_auto_packs_one_mini_of_any_rank_and_merges_it_below_64() -> None:
    """One mini packed wastes nothing; of rank 64 its ΔW and the gradient xᵀg cost more than its latents."""
    assert choose_strategy("auto", 1, 64, "cpu") == choose_strategy("auto", 1, 256, "tpu") == "packed"
    assert choose_strategy("auto", 1, 63, "cpu", True) == "merged"
    assert choose_strategy("auto", 1, 64, "cpu", True) == "packed"
    assert choose_strategy("auto", 2, 64, "cpu", True) == "merged"
