"""The filters of sampling against transformers' and against their definitions, and what is drawn against its law."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melora_jax.generation.sampling import Sampling, checked_sampling, chosen_tokens, filtered

VOCAB = 53
filter_logits = jax.jit(filtered)


@jax.jit
def choose(logits: Any, sampling: Sampling, key: Any, count: int) -> Any:
    return chosen_tokens(logits, sampling, key, jnp.arange(len(logits)), count)


def random_logits(seed: int, rows: int = 7, spread: float = 2.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal((rows, VOCAB))).astype(np.float32)


@pytest.mark.parity
@pytest.mark.parametrize("temperature", [0.31, 1.0, 2.3])
@pytest.mark.parametrize("top_k", [None, 1, 7, VOCAB, 97])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.53, 0.97])
def test_filters_keep_what_transformers_keeps(temperature, top_k, top_p):
    """Temperature, top-k and top-p one after another: the same tokens, and the same scores where they are kept."""
    import torch
    from transformers.generation import logits_process as warpers

    logits = random_logits(3)
    expected = torch.from_numpy(logits)
    chain = [
        (temperature, warpers.TemperatureLogitsWarper),
        (top_k, warpers.TopKLogitsWarper),
        (top_p, warpers.TopPLogitsWarper),
    ]
    for value, warper in chain:
        if value is not None:
            expected = warper(value)(None, expected)
    found = np.asarray(filter_logits(logits, checked_sampling(temperature, top_k, top_p)))
    np.testing.assert_array_equal(np.isfinite(found), torch.isfinite(expected).numpy())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@given(st.integers(0, 10**6), st.floats(0.01, 0.99), st.floats(0.1, 9.0))
def test_top_p_keeps_the_smallest_set_that_reaches_its_mass(seed, p, spread):
    logits = random_logits(seed, spread=spread)
    kept = np.isfinite(np.asarray(filter_logits(logits, Sampling(1.0, top_p=p))))
    odds = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    for mass, is_kept in zip(odds, kept, strict=True):
        assert mass[is_kept].sum() >= p - 1e-6
        assert mass[is_kept].sum() - mass[is_kept].min() < p + 1e-6
        assert mass[~is_kept].max(initial=0.0) < mass[is_kept].min()


@given(st.integers(0, 10**6), st.integers(1, VOCAB + 3))
def test_top_k_keeps_the_k_likeliest(seed, k):
    logits = random_logits(seed)
    kept = np.isfinite(np.asarray(filter_logits(logits, Sampling(1.0, top_k=k))))
    expected = np.argsort(np.argsort(-logits)) < k
    np.testing.assert_array_equal(kept, expected)


def test_equally_likely_tokens_stay_or_go_together():
    logits = jnp.array([[1.0, 3.0, 1.0, -2.0, 3.0], [0.0, -0.5, 0.0, 0.0, 0.0]])
    for sampling in (Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.4)):
        kept = jnp.isfinite(filter_logits(logits, sampling)).astype(int).tolist()
        assert kept == [[0, 1, 0, 0, 1], [1, 0, 1, 1, 1]]


def test_without_temperature_the_likeliest_is_taken():
    logits = random_logits(5)
    found = choose(logits, checked_sampling(0.0, None, None), jax.random.key(0), 3)
    np.testing.assert_array_equal(found, logits.argmax(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.8), (11, 0.9)])
def test_drawn_tokens_follow_the_filtered_distribution(top_k, top_p):
    """Pearson's statistic of 20,000 draws; over its bound by chance once in 10,000 keys."""
    from scipy.stats import chi2

    logits, sampling, draws = random_logits(11, rows=1), checked_sampling(1.7, top_k, top_p), 20_000
    key, row = jax.random.key(13), jnp.zeros(1, jnp.int32)
    draw = jax.vmap(lambda count: chosen_tokens(jnp.asarray(logits), sampling, key, row, count)[0])
    tokens = draw(jnp.arange(draws))
    expected = np.asarray(jax.nn.softmax(filtered(jnp.asarray(logits), sampling)))[0].astype(np.float64) * draws
    found = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert found[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert statistic < chi2.ppf(1 - 1e-4, kept.sum() - 1)


def test_each_row_has_a_stream_of_its_own():
    """A row's token depends on the key, its place and the count, and on no other row."""
    logits, sampling = jnp.asarray(random_logits(17)), Sampling(2.0, top_p=0.95)

    def draw(logits: jax.Array, count: int) -> list[int]:
        return choose(logits, sampling, jax.random.key(19), count).tolist()

    first = draw(logits, 0)
    assert draw(logits[:3], 0) == first[:3]
    assert draw(logits.at[:3].set(0.0), 0)[3:] == first[3:]
    assert draw(logits, 1) != first
    assert len(set(draw(jnp.zeros((7, VOCAB)), 0))) > 1


def test_settings_that_change_nothing_cost_nothing():
    assert checked_sampling(0.5, None, 1.0) == Sampling(0.5)
    assert checked_sampling(0, None, None) == Sampling()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ((-1.0, None, None), "temperature=-1.0 must be a number of at least 0"),
        ((float("nan"), None, None), "temperature=nan"),
        ((float("inf"), None, None), "temperature=inf"),
        ((True, None, None), "temperature=True"),
        ((1.0, 0, None), "top_k=0 must be a whole number of at least 1"),
        ((1.0, 2.5, None), r"top_k=2\.5"),
        ((1.0, None, 0.0), "top_p=0.0 must be a number above 0 and at most 1"),
        ((1.0, None, 1.01), "top_p=1.01"),
        ((0.0, 5, None), "top_k=5 chooses among .* leave top_k out"),
        ((0.0, None, 0.5), "top_p=0.5 chooses among .* set temperature"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        checked_sampling(*settings)
