"""Keys and values of the tokens that a decoder has seen, in arrays whose shapes never change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from melora_jax.models.decoders.masks import Tokens


class KVCache(NamedTuple):
    """A cache of s places; a pytree, so that it can be carried through `jax.jit` and `jax.lax.while_loop`.

    Each call writes its tokens, padding included, at the next places of all rows; padding is marked and never seen.

    Attributes:
      keys: `[b, s, f, k]` for each layer, f key and value heads of size k, already turned by RoPE; stacked layers
        share one array, with the layers as first axis.
      values: as `keys`, but not turned.
      positions: int32 `[b, s]`, the position of the token at each place.
      valid: bool `[b, s]`, True where there is a token.
      filled: int32, how many places are taken.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    valid: jax.Array
    filled: jax.Array

    @property
    def length(self) -> int:
        """How many places there are, s."""
        return self.positions.shape[1]

    @property
    def tokens(self) -> Tokens:
        """Where the tokens at the places stand."""
        return Tokens(self.positions, self.valid)


def empty_cache(
    leads: Sequence[tuple[int, ...]], shape: tuple[int, int, int, int], dtype: jax.typing.DTypeLike
) -> KVCache:
    """A cache without tokens.

    Args:
      leads: for each array, the axes before those of one layer: `()`, or how many layers are stacked in it.
      shape: `(b, s, f, k)` of one layer's keys.
      dtype: of keys and values.

    >>> empty_cache([(), ()], (3, 11, 2, 4), jnp.float32).length
    11
    """
    # separate arrays, so that a jitted step can be given each of them to reuse
    keys, values = (tuple(jnp.zeros((*lead, *shape), dtype) for lead in leads) for _ in range(2))
    positions, valid = jnp.zeros(shape[:2], jnp.int32), jnp.zeros(shape[:2], bool)
    return KVCache(keys, values, positions, valid, jnp.zeros((), jnp.int32))


def require_room(cache: KVCache, batch: int, count: int) -> None:
    """Checks that `count` more tokens a row fit, as far as the number of places taken is known.

    Raises:
      ValueError: they do not, or the cache is for another number of rows.
    """
    rows = cache.positions.shape[0]
    if rows != batch:
        raise ValueError(f"the cache holds {rows} rows, input_ids {batch}; make one with make_cache({batch}, length)")
    filled = 0 if isinstance(cache.filled, Tracer) else int(cache.filled)
    if filled + count > cache.length:
        raise ValueError(
            f"the cache has {cache.length} places, {filled} are taken and input_ids hold {count} tokens a row;"
            f" make a longer one with make_cache({rows}, {filled + count}), or shorten the prompt"
        )


def place_tokens(cache: KVCache, valid: jax.Array, positions: jax.Array) -> KVCache:
    """The cache with t more places taken; their keys and values are written layer by layer, with `written`.

    Args:
      cache: `[b, s]`.
      valid: bool `[b, t]`.
      positions: int `[b, t]`.
    """
    start = (0, cache.filled)
    return cache._replace(
        positions=jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), start),
        valid=jax.lax.dynamic_update_slice(cache.valid, valid, start),
        filled=cache.filled + valid.shape[1],
    )


def take_rows(cache: KVCache, rows: jax.Array) -> KVCache:
    """The cache of some of the rows, int32 `[c]`, in that order."""
    keys, values = (
        tuple(jnp.take(array, rows, axis=array.ndim - 4) for array in side) for side in (cache.keys, cache.values)
    )
    return KVCache(keys, values, cache.positions[rows], cache.valid[rows], cache.filled)


def next_positions(cache: KVCache, valid: jax.Array) -> jax.Array:
    """The positions of new tokens, int32 `[b, t]`, which count on from the last one of each row and skip padding."""
    last = jnp.where(cache.valid, cache.positions, -1).max(axis=1, keepdims=True)
    return jnp.maximum(last + jnp.cumsum(valid.astype(jnp.int32), axis=1), 0)


def written(cached: jax.Array, fresh: jax.Array, first: jax.Array) -> jax.Array:
    """One layer's keys or values `[b, s, f, k]` with `fresh` `[b, t, f, k]` at places `first`, `first + 1` ..."""
    return jax.lax.dynamic_update_slice(cached, fresh.astype(cached.dtype), (0, first, 0, 0))
