"""The choice of the next token: the likeliest one, or one drawn after temperature, top-k and top-p."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from melora_jax.validation import check_count


class Sampling(NamedTuple):
    """How tokens are drawn. As a pytree, new numbers need no new compilation, and an absent filter costs nothing.

    Attributes:
      temperature: the logits are divided by it; None takes the likeliest token.
      top_k: how many of the likeliest tokens may be drawn; None for all.
      top_p: only the likeliest tokens whose probabilities together reach it may be drawn; None for all.
    """

    temperature: float | jax.Array | None = None
    top_k: int | jax.Array | None = None
    top_p: float | jax.Array | None = None


def checked_sampling(temperature: float, top_k: int | None, top_p: float | None) -> Sampling:
    """Checks a user's settings.

    Args:
      temperature: at least 0; 0 takes the likeliest token.
      top_k: at least 1, or None.
      top_p: above 0 and at most 1, or None.

    Raises:
      ValueError: a value is out of range, or a filter is set although nothing is drawn.

    >>> checked_sampling(0.7, None, 1.0)
    Sampling(temperature=0.7, top_k=None, top_p=None)
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be a number of at least 0; 0 takes the likeliest token")
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and (isinstance(top_p, bool) or not isinstance(top_p, int | float) or not 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p!r} must be a number above 0 and at most 1; 1 or None keeps all tokens")
    if temperature > 0:
        return Sampling(float(temperature), top_k, None if top_p is None or top_p == 1 else float(top_p))
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None:
            raise ValueError(
                f"{name}={value!r} chooses among tokens that are drawn, but temperature=0 always takes the likeliest;"
                f" set temperature, such as 1.0, or leave {name} out"
            )
    return Sampling()


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits over the temperature, with -inf at the tokens that top-k and then top-p rule out.

    Top-p keeps the smallest set of likeliest tokens whose mass reaches p, after top-k. Tokens as likely as the last one
    kept are kept too, so that the result does not depend on the order of the vocabulary.

    Args:
      logits: float32 `[b, v]`.
      sampling: with a temperature.

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, section 3.1 (top-p).

    >>> logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2]]))
    >>> jnp.isfinite(filtered(logits, Sampling(1.0, top_p=0.65))).tolist()
    [[False, True, True, False]]
    """
    scores = logits if sampling.temperature is None else logits / sampling.temperature
    if sampling.top_k is not None:
        scores = _keep_top(scores, jnp.ones_like(scores), jnp.minimum(sampling.top_k, scores.shape[-1]))
    if sampling.top_p is not None:
        scores = _keep_top(scores, jax.nn.softmax(scores, axis=-1), sampling.top_p)
    return scores


def chosen_tokens(
    logits: jax.Array, sampling: Sampling, key: jax.Array | None, rows: jax.Array, count: jax.Array
) -> jax.Array:
    """The next token of each row, int32 `[b]`.

    Each row draws from its own stream, `fold_in(fold_in(key, row), count)`, whatever the other rows are.

    Args:
      logits: float32 `[b, v]`.
      sampling: how to choose.
      key: PRNG key of the whole text; None if nothing is drawn.
      rows: int32 `[b]`, each row's number in its batch.
      count: how many tokens each row has so far.
    """
    if key is None or sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(row: jax.Array, scores: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, row), count), scores)

    return jax.vmap(draw)(rows, filtered(logits, sampling)).astype(jnp.int32)


def _keep_top(scores: jax.Array, weights: jax.Array, least: int | float | jax.Array) -> jax.Array:
    """-inf below the greatest threshold at which the weights of the scores kept sum to `least` or more.

    The threshold is found bit by bit, in 32 passes over the vocabulary. `jax.lax.top_k` needs a fixed k, so that every
    new k would compile a program, and on CPU it sorts the whole vocabulary, which takes longer.
    """
    # a float's bits, mapped to unsigned numbers of the same order: negative ones inverted, positive ones above them
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)

    def with_bit(place: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (sign >> place.astype(jnp.uint32))
        reached = jnp.where(ordered >= higher, weights, 0).sum(axis=-1, keepdims=True) >= least
        return jnp.where(reached, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((*scores.shape[:-1], 1), jnp.uint32))
    return jnp.where(ordered >= threshold, scores, -jnp.inf)
