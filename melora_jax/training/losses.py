"""Next-token cross-entropy over pieces of the sequence, which never holds an array [tokens, vocab]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def chunked_cross_entropy(
    hidden: jax.Array,
    logits_of: Callable[[jax.Array], jax.Array],
    labels: jax.Array,
    weights: jax.Array,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Σ weights · −log softmax(logits_of(hidden))[labels], computed for about `chunk` tokens at once.

    Under `jax.grad`, the gradient of each piece is computed together with its logits, so that they are not computed
    twice as by `jax.checkpoint`.

    Args:
      hidden: the last hidden states, `[b t d]`, any floating dtype.
      logits_of: maps `[b c d]` to `[b c v]`, c ≤ t: the head, with any soft-capping. Arrays that it closes over receive
        gradients; random numbers that it draws are the same in each piece.
      labels: int `[b t]`, from 0 to v − 1.
      weights: each token's weight in the sum, float `[b t]`; 0 leaves a token out.
      chunk: the number of tokens, over all rows, whose logits are held at once. Pieces are cut along t, so that a
        sharded b stays sharded.

    Returns:
      `(total, losses)`: the weighted sum, a float32 scalar; and the unweighted loss of each token, float32 `[b t]`,
      through which no gradient flows.

    Raises:
      ValueError: `chunk` is below 1.

    >>> hidden, labels = jnp.zeros((1, 3, 2)), jnp.array([[0, 1, 1]])
    >>> total, losses = chunked_cross_entropy(hidden, lambda x: x, labels, jnp.array([[1.0, 1.0, 0.0]]))
    >>> round(float(total), 4), losses.shape  # 2 ln 2
    (1.3863, (1, 3))
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token")
    rows, length = labels.shape
    pieces = min(length, -(-rows * length // chunk))
    width = -(-length // pieces)
    # A custom_vjp differentiates arguments only, so the arrays that logits_of closes over become one: `captured`.
    converted: Any = jax.closure_convert(logits_of, hidden[:, :width])
    result: Any = _total(converted[0], width, hidden, labels, weights, converted[1])
    total, losses = result
    return total, jax.lax.stop_gradient(losses)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(head: Any, width: int, hidden: Any, labels: Any, weights: Any, captured: Any) -> tuple[jax.Array, jax.Array]:
    def one(piece: Any) -> jax.Array:
        return _losses(head(piece[0], *captured), piece[1])

    losses = _whole(jax.lax.map(one, (_cut(hidden, width), _cut(labels, width))), labels.shape[1])
    return (losses * weights).sum(), losses


def _forward(head: Any, width: int, hidden: Any, labels: Any, weights: Any, captured: Any) -> tuple[Any, Any]:
    def one(summed: Any, piece: Any) -> Any:
        states, targets, counts = piece

        def loss(states: jax.Array, captured: Any) -> tuple[jax.Array, jax.Array]:
            losses = _losses(head(states, *captured), targets)
            return (losses * counts).sum(), losses

        (to_states, to_captured), losses = jax.grad(loss, argnums=(0, 1), has_aux=True)(states, captured)
        return jax.tree.map(lambda old, new: old + new.astype(old.dtype), summed, to_captured), (to_states, losses)

    # The sum has many small terms, so it is float32 whatever the head's dtype. XLA removes it if the head is frozen.
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), captured)
    pieces = tuple(_cut(x, width) for x in (hidden, labels, weights))
    to_captured, (to_hidden, losses) = jax.lax.scan(one, start, pieces)
    to_hidden, losses = (_whole(x, labels.shape[1]) for x in (to_hidden, losses))
    dtypes = jax.tree.map(lambda x: jnp.zeros((), x.dtype), captured)
    return ((losses * weights).sum(), losses), (to_hidden, losses, to_captured, dtypes, jnp.zeros((), weights.dtype))


def _backward(head: Any, width: int, kept: Any, cotangents: Any) -> tuple[Any, ...]:
    to_hidden, losses, to_captured, dtypes, weight = kept
    by, _ = cotangents

    def scaled(x: jax.Array, like: jax.Array) -> jax.Array:
        return (by * x).astype(like.dtype)

    return scaled(to_hidden, to_hidden), None, scaled(losses, weight), jax.tree.map(scaled, to_captured, dtypes)


_total.defvjp(_forward, _backward)


def _losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def _cut(x: jax.Array, width: int) -> jax.Array:
    """[b t ...] → [pieces b width ...], the last piece padded with zeros, which have weight 0."""
    rows, length = x.shape[:2]
    pieces = -(-length // width)
    padded = jnp.pad(x, [(0, 0), (0, pieces * width - length), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(padded.reshape(rows, pieces, width, *x.shape[2:]), 1, 0)


def _whole(pieces: jax.Array, length: int) -> jax.Array:
    """The inverse of `_cut`."""
    joined = jnp.moveaxis(pieces, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
