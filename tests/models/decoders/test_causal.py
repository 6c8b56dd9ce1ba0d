"""A decoder's attention against NumPy, and the positions and masks it looks back by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melora_jax.models.decoders.masks import Tokens, causal_attention, causal_mask, token_positions

OPTIONS = {"window": None, "scale": 0.3, "softcap": None, "rate": 0.0, "path": "self"}


def nine(values: st.SearchStrategy) -> st.SearchStrategy[list]:
    return st.lists(values, min_size=9, max_size=9)


def by_hand(query, key, value, seen, scale, softcap=None):
    """Grouped attention of one query at a time, in float64."""
    mixed = np.zeros(query.shape)
    for b, t, h in np.ndindex(*query.shape[:3]):
        f = h // (query.shape[2] // key.shape[2])
        scores = key[b, :, f] @ query[b, t, h] * scale
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores[seen[b, t]].max()) * seen[b, t]
        mixed[b, t, h] = weights / weights.sum() @ value[b, :, f]
    return mixed


def random_heads(tokens: int = 11):
    rng = np.random.default_rng(3)
    return [rng.standard_normal((2, tokens, heads, 7)) for heads in (6, 2, 2)]


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("block", [3, 64])
def test_attention_equals_numpy(monkeypatch, softcap, window, masked, backend, block):
    """Our own code, in uneven blocks and all at once, and jax's on other devices than the CPU, which runs there too."""
    monkeypatch.setattr("melora_jax.models.decoders.masks._BLOCK", block)
    monkeypatch.setattr("melora_jax.models.decoders.masks.jax.default_backend", lambda: backend)
    query, key, value = random_heads()
    place = np.arange(11)
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - (window or 99))
    seen = np.broadcast_to(seen, (2, 11, 11))
    mask = None
    if masked:
        seen = seen & (np.random.default_rng(5).random((2, 11, 11)) < 0.6) | np.eye(11, dtype=bool)
        mask = jnp.asarray(seen)[:, None]
    heads = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    found = causal_attention(*heads, mask, **(OPTIONS | {"window": window, "softcap": softcap}))
    np.testing.assert_allclose(found, by_hand(query, key, value, seen, 0.3, softcap), rtol=0, atol=2e-6)


@pytest.mark.slow
def test_gradients_of_blocks_are_those_of_all_scores_at_once(monkeypatch):
    heads = [jnp.asarray(x, jnp.float32) for x in random_heads()]

    def gradients(block):
        monkeypatch.setattr("melora_jax.models.decoders.masks._BLOCK", block)
        return jax.grad(lambda heads: jnp.sin(causal_attention(*heads, None, **OPTIONS)).sum())(heads)

    for found, expected in zip(gradients(3), gradients(64), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_dropout_is_of_the_probabilities(monkeypatch, softcap):
    """With a mask of our own in its place, which keeps every other key and doubles it."""
    keep = 2.0 * (np.arange(11) % 2)
    monkeypatch.setattr("melora_jax.models.decoders.masks.dropout", lambda x, rate, path: x * keep)
    query, key, value = random_heads()
    seen = np.broadcast_to(np.tri(11, dtype=bool), (2, 11, 11))
    heads = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    found = causal_attention(*heads, None, **(OPTIONS | {"rate": 0.5, "softcap": softcap}))
    expected = by_hand(query, key, value * keep[:, None, None], seen, 0.3, softcap)
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_query_that_sees_nothing_has_finite_values_and_gradients(softcap):
    heads = [jnp.asarray(x, jnp.float32) for x in random_heads(3)]
    mask = jnp.zeros((2, 1, 3, 3), bool)

    def total(heads):
        return causal_attention(*heads, mask, **(OPTIONS | {"softcap": softcap})).sum()

    value, gradient = jax.value_and_grad(total)(heads)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in gradient)


@pytest.mark.parametrize(("softcap", "backend"), [(None, "cpu"), (50.0, "cpu"), (None, "gpu")])
def test_bfloat16_takes_the_softmax_in_float32(monkeypatch, softcap, backend):
    monkeypatch.setattr("melora_jax.models.decoders.masks.jax.default_backend", lambda: backend)
    # scores 256 and 257, which bfloat16 cannot tell apart; capped at 50 they are nearly equal
    query = jnp.array([32, 1, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    key = jnp.array([[16, 0, 0, 0], [16, 2, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    value = jnp.eye(2, 4, dtype=jnp.bfloat16).reshape(1, 2, 1, 4)
    mask = jnp.ones((1, 1, 1, 2), bool)
    found = causal_attention(query, key, value, mask, **(OPTIONS | {"scale": 0.5, "softcap": softcap}))
    scores = np.array([256.0, 257.0])
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    np.testing.assert_allclose(found.astype(jnp.float32).reshape(4)[:2], expected, rtol=2**-7)


@given(
    valid=nine(st.booleans()), segments=nine(st.integers(0, 2)), with_mask=st.booleans(), with_segments=st.booleans()
)
def test_positions_count_the_tokens_of_each_example(valid, segments, with_mask, with_segments):
    valid, segments = np.array(valid), np.array(segments)
    expected, count = [], 0
    for place in range(len(valid)):
        if with_segments and place and segments[place] != segments[place - 1]:
            count = 0
        is_token = bool(valid[place]) or not with_mask
        expected.append(max(count - (not is_token), 0))
        count += is_token
    found = token_positions(
        jnp.asarray(valid)[None] if with_mask else None,
        jnp.asarray(segments)[None] if with_segments else None,
        len(valid),
    )
    assert found[0].tolist() == expected


def test_a_mask_joins_all_that_hides_a_token():
    queries = Tokens(jnp.array([[2, 3]]), segments=jnp.array([[7, 8]]))
    keys = Tokens(jnp.array([[0, 1, 2, 3, 0]]), jnp.array([[1, 0, 1, 1, 1]], bool), jnp.array([[7, 7, 7, 8, 8]]))
    #                     position 0 is behind the window of 2, place 1 is padding, place 4 is not yet written
    assert causal_mask(queries, keys, 2, 2)[0, 0].astype(int).tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert causal_mask(queries, keys, 2, None)[0, 0].astype(int).tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
