"""A model's inputs: checks of its arrays before anything is computed, and the dropout key."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from melora_jax.core.dropout import dropout_key


def dropout_on(key: jax.Array | None) -> contextlib.AbstractContextManager[None]:
    """Enters `dropout_key(key)`; without a key, a `dropout_key` entered outside stays in force."""
    return contextlib.nullcontext() if key is None else dropout_key(key)


def checked_mask(mask: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """An attention mask as an array `[b, t]`.

    Raises:
      ValueError: its shape is not that of the token ids.
    """
    array = jnp.asarray(mask)
    require_shape("attention_mask", array, shape)
    return array


def matrix_of_whole_numbers(name: str, values: ArrayLike) -> jax.Array:
    """An argument as an array `[b, t]` of integers.

    Raises:
      ValueError: it is something else.
    """
    array = jnp.asarray(values)
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} are {array.dtype}{list(array.shape)}; give whole numbers of shape [batch, tokens]")
    return array


def require_shape(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless there is one value for each token id."""
    if array.shape != shape:
        raise ValueError(f"{name} have shape {list(array.shape)}, input_ids {list(shape)}; give one value a token")


def require_below(array: jax.Array, limit: int, name: str, limit_name: str, remedy: str) -> None:
    """Raises ValueError if a value lies outside [0, limit); inside a trace, where values are unknown, never."""
    if isinstance(array, Tracer) or not array.size:
        return
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} range from {low} to {high}, {limit_name} is {limit}; {remedy}")
