"""Llama, Mistral, Qwen and Gemma: from token ids to the last hidden states, all at once or with a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.models.base import HuggingFaceModel
from melora_jax.models.decoders.config import SLIDING, DecoderConfig
from melora_jax.models.decoders.kv_cache import KVCache, empty_cache, next_positions, place_tokens, require_room
from melora_jax.models.decoders.layers import DecoderLayer, DecoderParts, GemmaLayer, KeyValue, Shared
from melora_jax.models.decoders.masks import Tokens, causal_mask, token_positions
from melora_jax.models.decoders.rope import rotations
from melora_jax.models.inputs import checked_mask, dropout_on, matrix_of_whole_numbers, require_below, require_shape
from melora_jax.nn.scan_layers import Layers
from melora_jax.nn.sharding import constrain

# what the forward pass keeps of a layer for the backward pass, which recomputes the rest
_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
REMAT = ("none", *_POLICIES)


class DecoderModel(HuggingFaceModel):
    """Embedding, layers and last normalisation.

    Args:
      parts: makes the layers.
      prefix: what its variables' paths begin with inside a model with a head, "model/"; "" on its own.
    """

    def __init__(self, parts: DecoderParts, *, prefix: str = "") -> None:
        sizes = parts.config
        self.sizes: DecoderConfig = sizes
        self.prefix = prefix
        self.remat = parts.remat
        self.embed_tokens = parts.embed()
        kind = GemmaLayer if sizes.gemma else DecoderLayer
        self.layers = Layers([kind(parts, sizes.window_of(index)) for index in range(sizes.num_layers)])
        self.norm = parts.norm(sizes.hidden_size)

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The last hidden states, `[b, t, d]`.

        Args:
          input_ids: whole numbers `[b, t]`.
          attention_mask: `[b, t]`, 0 at padding, left or right; None without padding.
          position_ids: whole numbers `[b, t]` or `[1, t]`; None counts the tokens of each example from 0 and skips
            padding.
          segment_ids: whole numbers `[b, t]`, a different one for each example packed into a row: tokens see only
            tokens of their own example. None if each row is one example.
          key: PRNG key that turns dropout on; None leaves an outer `dropout_key` in force.

        Raises:
          ValueError: shapes differ, or a known id is outside the vocabulary.
        """
        ids = self._checked(input_ids)
        valid = None if attention_mask is None else checked_mask(attention_mask, ids.shape) != 0
        segments = None if segment_ids is None else matrix_of_whole_numbers("segment_ids", segment_ids)
        if segments is not None:
            require_shape("segment_ids", segments, ids.shape)
        given = _checked_positions(position_ids, ids.shape)
        positions = token_positions(valid, segments, ids.shape[1]) if given is None else given
        tokens = Tokens(positions, valid, segments)
        first = jnp.zeros((), jnp.int32)

        def mask_for(window: int | None) -> jax.Array | None:
            in_order = valid is None and segments is None and (given is None or window is None)
            return None if in_order else causal_mask(tokens, tokens, first, window)

        shared = self._shared(tokens, mask_for, first)
        with dropout_on(key):
            x, _ = self._run(self._embedded(ids), shared, None)
        return self.norm(x)

    def make_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens, padding included.

        Args:
          batch: rows.
          length: places a row.
          dtype: of keys and values; None is the model's.
        """
        sizes = self.sizes
        shape = (batch, length, sizes.num_kv_heads, sizes.head_dim)
        return empty_cache(self.layers.leads(), shape, self.embed_tokens.dtype if dtype is None else dtype)

    def advance(
        self,
        input_ids: ArrayLike,
        cache: KVCache,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The last hidden states of further tokens, `[b, t, d]`, and the cache with them in it.

        Prompts of unequal length may be padded left or right: padding takes up places but is never attended to.

        Args:
          input_ids: whole numbers `[b, t]`, the tokens after those in the cache.
          cache: from `make_cache`, or an earlier call.
          attention_mask: `[b, t]`, 0 at padding among the new tokens.
          position_ids: whole numbers `[b, t]` or `[1, t]`; None continues to count.

        Raises:
          ValueError: shapes differ, a known id is outside the vocabulary, or the cache is known to be too short. Inside
            a trace, where it is not known, the hidden states of a call that does not fit are NaN.
        """
        ids = self._checked(input_ids)
        require_room(cache, *ids.shape)
        valid = jnp.ones(ids.shape, bool) if attention_mask is None else checked_mask(attention_mask, ids.shape) != 0
        given = _checked_positions(position_ids, ids.shape)
        positions = next_positions(cache, valid) if given is None else jnp.broadcast_to(given, ids.shape)
        fits = cache.filled + ids.shape[1] <= cache.length
        first, cache = cache.filled, place_tokens(cache, valid, positions)
        queries = Tokens(positions)
        shared = self._shared(queries, lambda window: causal_mask(queries, cache.tokens, first, window), first)
        x, kept = self._run(self._embedded(ids), shared, list(zip(cache.keys, cache.values, strict=True)))
        keys, values = zip(*kept, strict=True)
        return jnp.where(fits, self.norm(x), jnp.nan), cache._replace(keys=keys, values=values)

    def _checked(self, input_ids: ArrayLike) -> jax.Array:
        ids = matrix_of_whole_numbers("input_ids", input_ids)
        if not ids.shape[1]:
            raise ValueError("input_ids hold 0 tokens a row; give at least one")
        limit = self.sizes.vocab_size
        require_below(ids, limit, "input_ids", "vocab_size", "use the tokenizer of this checkpoint")
        return ids

    def _embedded(self, ids: jax.Array) -> jax.Array:
        x = constrain(self.embed_tokens(ids))
        # Gemma was trained with the factor rounded to the dtype
        return x * jnp.asarray(self.sizes.hidden_size**0.5, x.dtype) if self.sizes.gemma else x

    def _shared(
        self, tokens: Tokens, mask_for: Callable[[int | None], jax.Array | None], first: jax.Array
    ) -> dict[str, Shared]:
        """What the layers of each type share."""
        shared = {}
        for kind, rope in self.sizes.ropes:
            mask = mask_for(self.sizes.window if kind == SLIDING else None)
            shared[kind] = Shared(*rotations(rope, tokens.positions), mask, first)
        return shared

    def _run(
        self, x: jax.Array, shared: dict[str, Shared], cached: Sequence[KeyValue] | None
    ) -> tuple[jax.Array, list[KeyValue]]:
        """All layers. With a cache there is no backward pass, so nothing is rematerialised."""

        def call(layer: DecoderLayer, x: jax.Array, number: int, path: str, entry: KeyValue | None) -> Any:
            own = shared[self.sizes.layer_types[number]]
            if self.remat == "none" or entry is not None:
                return layer(x, own, entry, path)
            return _rematerialised(layer, x, own, path, self.remat), None

        return self.layers.run(x, call, f"{self.prefix}layers", cached)


def _rematerialised(layer: DecoderLayer, x: jax.Array, shared: Shared, path: str, remat: str) -> jax.Array:
    graphdef, state = nnx.split(layer)

    @partial(jax.checkpoint, policy=_POLICIES[remat])
    def run(state: nnx.State, x: jax.Array, shared: Shared) -> jax.Array:
        return nnx.merge(graphdef, state, copy=True)(x, shared, None, path)[0]

    return run(state, x, shared)


def _checked_positions(position_ids: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array | None:
    if position_ids is None:
        return None
    positions = matrix_of_whole_numbers("position_ids", position_ids)
    if positions.shape[0] != 1:
        require_shape("position_ids", positions, shape)
    else:
        require_shape("position_ids", positions, (1, shape[1]))
    return positions
