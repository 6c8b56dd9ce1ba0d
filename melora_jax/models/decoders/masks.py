"""Attention of a decoder: every token looks back, as far as padding, its segment and the layer's window let it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from melora_jax.core.dropout import dropout
from melora_jax.core.platform import platform

# Finite, so that a row that may look at nothing gets equal weights and not 0/0.
_MASKED = -1e30

# Without a cache a block of queries needs no key behind its end, so up to half of the scores are never computed.
# Smaller or more blocks are hardly faster.
_BLOCK, _BLOCKS = 64, 8


class Tokens(NamedTuple):
    """Where the tokens of a batch stand.

    Attributes:
      positions: int `[b, t]`, or `[1, t]` where all rows are alike.
      valid: bool `[b, t]`, False at padding; None where there is none.
      segments: int `[b, t]`, the number of the example that a token belongs to; None where each row holds one.
    """

    positions: jax.Array
    valid: jax.Array | None = None
    segments: jax.Array | None = None


def token_positions(valid: jax.Array | None, segments: jax.Array | None, length: int) -> jax.Array:
    """Positions that count the tokens of each example from 0 and pass over padding, int32 `[1, t]` or `[b, t]`.

    Args:
      valid: bool `[b, t]`, False at padding, or None.
      segments: int `[b, t]`, changing where a new example starts, or None.
      length: t.

    >>> token_positions(jnp.array([[False, True, True]]), None, 3).tolist()
    [[0, 0, 1]]
    >>> token_positions(None, jnp.array([[1, 1, 2, 2]]), 4).tolist()
    [[0, 1, 0, 1]]
    """
    if valid is None and segments is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    is_token = jnp.ones((1, length), jnp.int32) if valid is None else valid.astype(jnp.int32)
    count = jnp.cumsum(is_token, axis=1)
    if segments is not None:
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        before = jnp.where(starts, count - is_token, 0)
        count = count - jax.lax.cummax(before, axis=1)
    return jnp.maximum(count - 1, 0)


def causal_mask(queries: Tokens, keys: Tokens, first: int | jax.Array, window: int | None) -> jax.Array:
    """Which keys each query sees, bool `[b or 1, 1, t, s]`.

    Args:
      queries: t tokens.
      keys: s tokens in the order in which they were written; with a cache, the queries' own among them.
      first: the place among the keys of the first query.
      window: how many positions back a query sees, its own included; None sees all.

    >>> row = Tokens(jnp.arange(3)[None])
    >>> causal_mask(row, row, 0, 2)[0, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    t, s = queries.positions.shape[1], keys.positions.shape[1]
    seen = (jnp.arange(s) <= first + jnp.arange(t)[:, None])[None]
    if keys.valid is not None:
        seen = seen & keys.valid[:, None, :]
    if queries.segments is not None and keys.segments is not None:
        seen = seen & (queries.segments[:, :, None] == keys.segments[:, None, :])
    if window is not None:
        seen = seen & (keys.positions[:, None, :] > queries.positions[:, :, None] - window)
    return seen[:, None]


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    rate: float,
    path: str,
) -> jax.Array:
    """Grouped-query attention, `dropout(softmax(cap(scale · query keyᵀ))) value`, with the softmax in float32.

    Args:
      query: `[b, t, h, k]`; head j reads key and value head `j // (h / f)`.
      key: `[b, s, f, k]`, f dividing h.
      value: `[b, s, f, k]`.
      mask: bool `[b or 1, 1, t, s]`, from `causal_mask`; None sees what lies back and within the window.
      window: how many tokens back a query sees where there is no mask.
      scale: the scores are multiplied by it.
      softcap: the scores become `softcap · tanh(scores / softcap)`; None leaves them.
      rate: dropout rate of the attention probabilities.
      path: the dropout site's path.

    Returns:
      `[b, t, h, k]` in the dtype of `value`.

    Source: Ainslie et al. 2023 (grouped queries); Gemma 2, section 2 (soft-capping).

    >>> query, key = jnp.ones((2, 5, 6, 4)), jnp.ones((2, 5, 3, 4))
    >>> causal_attention(query, key, key, None, window=None, scale=0.5, softcap=None, rate=0.0, path="").shape
    (2, 5, 6, 4)
    """
    if softcap is None and rate == 0.0 and platform() != "cpu":
        back = None if mask is not None or window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=mask is None, local_window_size=back
        )
    if mask is None:
        tokens = Tokens(jnp.arange(query.shape[1])[None])
        mask = causal_mask(tokens, tokens, 0, window)
    length = query.shape[1]
    cached = key.shape[1] - length  # places of a cache, which may be longer than what is written
    # The masks of dropout are drawn for all scores at once.
    widest = length if rate or cached else max(_BLOCK, -(-length // _BLOCKS))
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    mixed = []
    for start in range(0, length, widest):
        end = min(length, start + widest)
        seen = end + cached
        mixed.append(
            _attend(
                query[:, start:end],
                key[:, :, :seen],
                value[:, :, :seen],
                mask[:, :, start:end, :seen],
                scale=scale,
                softcap=softcap,
                rate=rate,
                path=path,
            )
        )
    return jnp.concatenate(mixed, axis=1)


def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    rate: float,
    path: str,
) -> jax.Array:
    """`causal_attention` with all scores at once; key and value are `[b, f, s, k]`."""
    # The heads that share a key and value head, laid one after another, are one matrix: on CPU faster than an einsum
    # over groups and than jax.nn.dot_product_attention.
    (b, t, h, k), f = query.shape, key.shape[1]
    rows = jnp.moveaxis(query.reshape(b, t, f, h // f, k), 1, 3).reshape(b, f, -1, k)
    scores = jnp.matmul(rows, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None], scores.reshape(b, f, h // f, t, -1), _MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = dropout(weights, rate, path).astype(value.dtype).reshape(b, f, h // f * t, -1)
    mixed = jnp.matmul(weights, value, preferred_element_type=jnp.float32).reshape(b, f, h // f, t, k) / total
    return jnp.moveaxis(mixed, 3, 1).reshape(query.shape).astype(value.dtype)
