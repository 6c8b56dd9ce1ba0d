"""Rotary embeddings of every kind against transformers, and what a rotation must be."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melora_jax.models.decoders.rope import rope_from, rotate, rotations

# As checkpoints have them: Llama 3.1, Qwen 2.5 and 3 with YaRN, and settings that nobody publishes but the format has.
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-short": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 61, "beta_fast": 7},
    "yarn-sharp": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3, "beta_slow": 3.0, "truncate": False},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn-of-one": {"rope_type": "yarn", "factor": 1.0},
}
LIMIT = 131072


def rope(name: str, size: int = 46, theta: float = 5e5, limit: int = LIMIT):
    return rope_from(PARAMETERS[name], size=size, theta=theta, limit=limit, where="config.json")


@pytest.mark.parity
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("size", "theta"), [(46, 5e5), (128, 1e4)])
def test_angles_equal_those_of_transformers(name, size, theta):
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    transformers.utils.logging.set_verbosity_error()
    config = transformers.LlamaConfig(
        hidden_size=size * 2,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        rope_theta=theta,
        rope_scaling=dict(PARAMETERS[name]) or None,  # which it writes into
    )
    positions = np.array([[0, 1, 2, 29, 61, 127]])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
    found = rotations(rope(name, size, theta), jnp.asarray(positions))
    for ours, theirs in zip(found, expected, strict=True):
        # at position 127 one rounding of a frequency turns by 127 · 2^-24
        np.testing.assert_allclose(np.concatenate([ours, ours], -1), theirs.numpy(), rtol=0, atol=3e-5)


@pytest.mark.parity
@pytest.mark.parametrize("length", [5, 31, 32, 97])
def test_a_dynamic_embedding_slows_beyond_its_limit_as_in_transformers(length):
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=46,
        num_attention_heads=1,
        max_position_embeddings=31,
        rope_scaling={"type": "dynamic", "factor": 3.0},
    )
    positions = np.arange(length)[None]
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions))
    found = rotations(rope("dynamic", theta=1e4, limit=31), jnp.asarray(positions))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.concatenate([ours, ours], -1), theirs.numpy(), rtol=0, atol=3e-5)
    plain = rotations(rope("default", theta=1e4, limit=31), jnp.asarray(positions))
    assert (np.abs(found[1] - plain[1]).max() > 0.01) == (length > 31)


@given(
    name=st.sampled_from(sorted(PARAMETERS)), query=st.integers(0, 900), key=st.integers(0, 900), by=st.integers(0, 99)
)
def test_scores_depend_on_the_distance_alone(name, query, key, by):
    turning = rope(name)
    rng = np.random.default_rng(query + 1000 * key)
    x = jnp.asarray(rng.standard_normal((1, 2, 1, 46)), jnp.float32)
    scores = []
    for shift in (0, by):
        turned = rotate(x, *rotations(turning, jnp.array([[query + shift, key + shift]])))
        scores.append(float(jnp.vdot(turned[0, 0], turned[0, 1])))
        norms = np.linalg.norm(np.asarray(turned)[0, :, 0], axis=-1) / np.linalg.norm(np.asarray(x)[0, :, 0], axis=-1)
        np.testing.assert_allclose(norms, turning.magnitude, rtol=1e-5)
    # angles of up to a thousand, rounded to 2^-24 of themselves, on a score of up to 46 · magnitude²
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=5e-3 * turning.magnitude**2)


def test_rotations_stay_float32_for_a_bfloat16_model():
    cos, sin = rotations(rope("default"), jnp.array([[1000]]))
    assert cos.dtype == sin.dtype == jnp.float32
    x = jnp.ones((1, 1, 3, 46), jnp.bfloat16)
    assert rotate(x, cos, sin).dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(rotate(x, cos, sin), exact.astype(jnp.bfloat16))


BAD = {
    "RoPE of type 'longrope' in config.json is not supported; choose from default, linear, dynamic, llama3, yarn": {
        "rope_type": "longrope"
    },
    "RoPE of type 'mrope' in config.json": {"type": "mrope"},
    "config.json lacks factor": {"type": "linear"},
    "config.json lacks low_freq_factor": {"type": "llama3", "factor": 8},
    "factor='8' in config.json must be a number": {"type": "linear", "factor": "8"},
    "factor=True in config.json must be a number": {"type": "linear", "factor": True},
    "factor=-2 in config.json must be a positive number": {"type": "dynamic", "factor": -2},
    "rope_theta=0 in config.json must be a positive number": {"rope_theta": 0},
    "partial_rotary_factor=0.5 in config.json is not supported": {"partial_rotary_factor": 0.5},
    "high_freq_factor=1.0 in config.json is not above low_freq_factor=4.0": {
        "type": "llama3",
        "factor": 8,
        "low_freq_factor": 4,
        "high_freq_factor": 1,
    },
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_parameters_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        rope_from(BAD[message], size=6, theta=1e4, limit=31, where="config.json")
    assert "\n" not in str(error.value)


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match=r"head_dim=7 in config\.json is odd"):
        rope("default", size=7)
