"""Decoding with a cache: the same as all at once, whatever the padding, the chunks and the window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from melora_jax.models.decoders.kv_cache import empty_cache, take_rows
from tests.support.decoder_fixtures import FAMILIES, TOKENS, apply, random_decoder, token_ids

step = nnx.jit(lambda model, *inputs: model.step(*inputs))
PROMPTS, LENGTH, CHUNKS = [7, 3, 5], 7, (1, 1, 3)


def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole rows, and their prompts `[3, 7]` with mask: one full, one padded left, one padded right."""
    ids = token_ids()
    padded, mask = np.zeros((3, LENGTH), np.int32), np.zeros((3, LENGTH), np.int32)
    for row, (count, first) in enumerate(zip(PROMPTS, [0, 4, 0], strict=True)):
        padded[row, first : first + count] = ids[row, :count]
        mask[row, first : first + count] = 1
    return ids, padded, mask


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_step_by_step_equals_all_at_once(name):
    model = random_decoder(name)
    ids, padded, mask = prompts()
    expected = np.asarray(apply(model, ids))
    cache = model.make_cache(3, 17)
    logits, cache = step(model, padded, cache, mask)
    for row, count in enumerate(PROMPTS):
        np.testing.assert_allclose(logits[row][mask[row] == 1], expected[row, :count], rtol=0, atol=5e-6)
    done = np.array(PROMPTS)
    for size in CHUNKS:
        places = done[:, None] + np.arange(size)
        logits, cache = step(model, np.take_along_axis(ids, places, axis=1), cache)
        wanted = np.take_along_axis(expected, places[..., None], axis=1)
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=5e-6)
        done += size
    assert int(cache.filled) == LENGTH + sum(CHUNKS)
    for row, count in enumerate(done):
        np.testing.assert_array_equal(cache.positions[row][cache.valid[row]], np.arange(count))


def test_hidden_states_of_the_last_token_are_enough_for_a_prompt():
    model = random_decoder("smollm2")
    _, padded, mask = prompts()
    hidden, cache = model.advance(padded, model.make_cache(3, 17), mask)
    logits, same = model.step(padded, model.make_cache(3, 17), mask)
    np.testing.assert_allclose(model.logits(hidden[:, -1]), logits[:, -1], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(cache.positions, same.positions)


def test_positions_may_be_given():
    model = random_decoder("gemma3_text")
    ids = token_ids()
    cache = model.make_cache(3, TOKENS)
    _, shifted = step(model, ids[:, :7], cache, None, np.arange(7)[None] + 31)
    found, _ = step(model, ids[:, 7:8], shifted)
    np.testing.assert_allclose(found, apply(model, ids)[:, 7:8], rtol=0, atol=1e-5)


def test_a_cache_is_a_pytree_of_fixed_shapes():
    model = random_decoder("gemma2", dtype="bfloat16")
    cache = model.make_cache(3, 11)
    assert (cache.length, len(cache.keys), cache.keys[0].shape) == (11, 2, (3, 11, 2, 10))
    assert cache.keys[0].dtype == cache.values[1].dtype == jnp.bfloat16
    assert model.make_cache(3, 11, "float32").keys[0].dtype == jnp.float32
    _, after = jax.eval_shape(model.step, jnp.ones((3, 1), int), cache)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), cache
    )
    pointers = [leaf.unsafe_buffer_pointer() for leaf in (*cache.keys, *cache.values)]
    assert len(set(pointers)) == 4  # none is shared, so a jitted step can take them over


def test_a_body_without_head_has_a_cache_too():
    model, ids = random_decoder("qwen3", task="encoder"), token_ids()
    hidden, _ = nnx.jit(lambda model, *inputs: model.advance(*inputs))(model, ids, model.make_cache(3, TOKENS))
    np.testing.assert_allclose(hidden, apply(model, ids), rtol=0, atol=5e-6)


def test_what_does_not_fit_is_refused():
    model, ids = random_decoder("llama"), token_ids()
    with pytest.raises(
        ValueError, match=r"the cache has 7 places, 0 are taken and input_ids hold 8 tokens a row; make a"
    ):
        model.step(ids[:, :8], model.make_cache(3, 7))
    _, cache = model.step(ids[:, :5], model.make_cache(3, 7))
    with pytest.raises(ValueError, match=r"7 places, 5 are taken and input_ids hold 3 .* make_cache\(3, 8\)"):
        model.step(ids[:, :3], cache)
    with pytest.raises(ValueError, match=r"the cache holds 2 rows, input_ids 3; make one with make_cache\(3, length\)"):
        model.step(ids, model.make_cache(2, 31))
    with pytest.raises(ValueError, match=r"attention_mask have shape \[3, 2\], input_ids \[3, 1\]"):
        model.step(ids[:, :1], cache, np.ones((3, 2)))
    with pytest.raises(ValueError, match="input_ids range from 101"):
        model.step(np.full((3, 1), 101), cache)


def test_inside_a_trace_what_does_not_fit_is_nan():
    model, ids = random_decoder("llama"), token_ids()
    logits, cache = step(model, ids[:, :3], model.make_cache(3, 7))
    assert np.isfinite(logits).all()
    logits, cache = step(model, ids[:, :3], cache)
    assert np.isfinite(logits).all()
    logits, _ = step(model, ids[:, :3], cache)
    assert np.isnan(logits).all()


def test_some_rows_are_taken_of_layers_alone_and_stacked():
    cache = empty_cache([(), (2,)], (3, 5, 2, 7), jnp.float32)
    leaves, tree = jax.tree.flatten(cache)
    cache = jax.tree.unflatten(tree, [jnp.arange(leaf.size).reshape(leaf.shape) for leaf in leaves])
    rows = np.array([2, 0])
    found = take_rows(cache, jnp.asarray(rows))
    np.testing.assert_array_equal(found.keys[0], cache.keys[0][rows])
    np.testing.assert_array_equal(found.values[1], cache.values[1][:, rows])
    np.testing.assert_array_equal(found.positions, cache.positions[rows])
    np.testing.assert_array_equal(found.valid, cache.valid[rows])
