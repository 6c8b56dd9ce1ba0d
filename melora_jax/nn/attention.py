"""Attention of an encoder: every token looks at every token that is not padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from melora_jax.core.dropout import dropout

# Finite, so that a row of nothing but padding gets equal weights and not 0/0.
_MASKED = -1e30


def padding_bias(attention_mask: jax.Array) -> jax.Array:
    """The number added to each score: 0 for a token, -1e30 for padding.

    Args:
      attention_mask: `[b, s]`, nonzero where there is a token.

    Returns:
      float32 `[b, 1, 1, s]`, to be added to scores `[b, h, t, s]`.

    >>> padding_bias(jnp.array([[1, 0]])).tolist()
    [[[[0.0, -1.0000000150474662e+30]]]]
    """
    return jnp.where(attention_mask != 0, 0.0, _MASKED).astype(jnp.float32)[:, None, None, :]


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, rate: float, path: str
) -> jax.Array:
    """Scaled dot-product attention, `dropout(softmax(query keyᵀ / √k + bias)) value`, with the softmax in float32.

    Args:
      query: `[b, t, h, k]`: h heads of size k.
      key: `[b, s, h, k]`.
      value: `[b, s, h, k]`.
      bias: float32, broadcastable to `[b, h, t, s]`, or None.
      rate: dropout rate of the attention probabilities.
      path: the dropout site's path.

    Returns:
      `[b, t, h, k]` in the dtype of `value`.

    Source: Vaswani et al. 2017, equation 1.

    >>> attention(*[jnp.ones((2, 5, 3, 7))] * 3, None, 0.0, "attention/self").shape
    (2, 5, 3, 7)
    """
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.matmul(query, jnp.swapaxes(key, 2, 3), preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    # Dividing after the product with `value` saves two passes over [t, s], which on CPU makes this faster than softmax
    # first and than jax.nn.dot_product_attention.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    weights = dropout(weights, rate, path).astype(value.dtype)
    mixed = jnp.matmul(weights, value, preferred_element_type=jnp.float32) / total
    return jnp.swapaxes(mixed, 1, 2).astype(value.dtype)
