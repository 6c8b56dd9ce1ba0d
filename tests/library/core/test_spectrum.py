"""Oracles: numpy.linalg.svd and matrix_rank of the dense update; scipy.stats.entropy for the effective rank."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from melora_jax.core.spectrum import effective_rank, numerical_rank, singular_values

sizes = st.integers(1, 13)
seeds = st.integers(0, 2**32 - 1)


def factors(seed: int, d_in: int, rank: int, d_out: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(d_in, rank)), rng.normal(size=(rank, d_out))


def block_diagonal_factors(n: int, r: int, i: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n * 100 + r)
    a = rng.normal(size=(n, i, r)).astype(np.float32)
    b = rng.normal(size=(n, r, o)).astype(np.float32)
    return np.asarray(scipy.linalg.block_diag(*a)), np.asarray(scipy.linalg.block_diag(*b))


@given(seeds, sizes, sizes, sizes)
def test_equals_the_svd_of_the_dense_update(seed: int, d_in: int, rank: int, d_out: int) -> None:
    left, right = factors(seed, d_in, rank, d_out)
    values = singular_values(left, right)
    dense = np.linalg.svd(left @ right, compute_uv=False)
    assert values.dtype == np.float64
    assert values.shape == (min(d_in, rank, d_out),)
    np.testing.assert_allclose(values, dense[: len(values)], rtol=0, atol=1e-12 * dense[0])
    np.testing.assert_allclose(dense[len(values) :], 0.0, atol=1e-12 * dense[0])


@given(seeds, sizes, sizes, sizes)
def test_rank_equals_matrix_rank_of_the_dense_update(seed: int, d_in: int, rank: int, d_out: int) -> None:
    left, right = factors(seed, d_in, rank, d_out)
    assert numerical_rank(singular_values(left, right)) == np.linalg.matrix_rank(left @ right, rtol=1e-6)


@pytest.mark.parametrize(("n", "r"), [(1, 3), (2, 3), (5, 1), (5, 2)])
def test_n_minis_of_rank_r_have_rank_n_r(n: int, r: int) -> None:
    left, right = block_diagonal_factors(n, r, i=7, o=11)
    assert numerical_rank(singular_values(left, right)) == n * r == np.linalg.matrix_rank(left @ right)


def test_mixer_all_has_rank_r_although_it_has_n_r_columns() -> None:
    left, right = block_diagonal_factors(n=5, r=2, i=7, o=11)
    mixed = np.kron(np.ones((5, 5)), np.eye(2)) @ right
    values = singular_values(left, mixed)
    assert values.shape == (10,)
    assert numerical_rank(values) == 2


def test_float32_rounding_adds_no_rank() -> None:
    left, right = factors(0, 31, 3, 37)
    rounded = (left @ right).astype(np.float32)
    values = singular_values(rounded, np.eye(37))
    assert numerical_rank(values) == 3
    assert numerical_rank(values, rtol=0.0) == 31


def test_jax_arrays_of_low_precision_are_read_exactly() -> None:
    left, right = (jnp.asarray(factor, jnp.bfloat16) for factor in factors(1, 7, 3, 5))
    dense = np.linalg.svd(np.asarray(left, np.float64) @ np.asarray(right, np.float64), compute_uv=False)
    np.testing.assert_allclose(singular_values(left, right), dense[:3], rtol=1e-12)


@given(st.lists(st.floats(0.0, 1e150), min_size=1, max_size=13))
def test_effective_rank_is_the_exponential_of_the_entropy(values: list[float]) -> None:
    measured = effective_rank(values)
    if max(values) == 0.0:
        assert measured == 0.0
        return
    scaled = np.asarray(values) / max(values)
    assert measured == pytest.approx(np.exp(scipy.stats.entropy(scaled)), rel=1e-12)
    assert 1.0 - 1e-12 <= measured <= len(values) + 1e-9


@given(st.integers(1, 17), st.floats(1e-300, 1e300))
def test_effective_rank_of_equal_values_is_their_number(k: int, value: float) -> None:
    assert effective_rank([value] * k) == pytest.approx(k)


def test_an_update_of_zeros_has_rank_zero() -> None:
    values = singular_values(np.ones((5, 2)), np.zeros((2, 3)))
    assert numerical_rank(values) == 0
    assert effective_rank(values) == 0.0
    assert numerical_rank([]) == 0
    assert effective_rank([]) == 0.0


def test_bad_input_says_what_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"left has shape \[5, 2\] and right \[3, 7\].*left \[d_in, R\]"):
        singular_values(np.ones((5, 2)), np.ones((3, 7)))
    with pytest.raises(ValueError, match=r"right has entries that are not finite.*diverged"):
        singular_values(np.ones((5, 1)), np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match=r"values\[1\] is -1.0"):
        effective_rank([2.0, -1.0])
    with pytest.raises(ValueError, match=r"values\[0\] is inf"):
        numerical_rank([np.inf])
    with pytest.raises(ValueError, match=r"shape \[2, 2\]"):
        numerical_rank(np.eye(2))
    with pytest.raises(ValueError, match=r"rtol=1.0 is outside \[0, 1\)"):
        numerical_rank([1.0], rtol=1.0)
