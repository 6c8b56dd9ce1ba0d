"""A decoder as a language model: the head over the vocabulary, on all tokens or on the newest with a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.models.base import HuggingFaceModel
from melora_jax.models.decoders.kv_cache import KVCache
from melora_jax.models.decoders.layers import DecoderParts
from melora_jax.models.decoders.model import DecoderModel


class CausalLM(HuggingFaceModel):
    """A decoder with its head over the vocabulary, which is the embedding where the two are tied.

    Args:
      parts: makes the layers.
      remat: as in `DecoderModel`.
    """

    def __init__(self, parts: DecoderParts, *, remat: str = "none") -> None:
        sizes = parts.config
        self.sizes = sizes
        self.model = DecoderModel(parts, remat=remat, prefix="model/")
        if not sizes.tied:
            self.lm_head = parts.linear(
                sizes.hidden_size, sizes.vocab_size, bias=False, output_dtype=jnp.dtype(jnp.float32)
            )

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The logits of each next token, float32 `[b, t, v]`. Arguments and errors are those of `DecoderModel`."""
        return self.logits(self.hidden(input_ids, attention_mask, position_ids, segment_ids, key=key))

    def hidden(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The last hidden states, `[b, t, d]`: for a loss that takes the logits of a few tokens at a time."""
        return self.model(input_ids, attention_mask, position_ids, segment_ids, key=key)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: hidden states `[..., d]` to float32 logits `[..., v]`."""
        logits = self.model.embed_tokens.attend(hidden) if self.sizes.tied else self.lm_head(hidden)
        cap = self.sizes.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def output_embeddings(self) -> nnx.Module:
        """The layer that gives the logits, which `targets="all-linear"` leaves out."""
        return self.model.embed_tokens if self.sizes.tied else self.lm_head

    def make_cache(self, batch: int, length: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
        """An empty cache for `batch` rows of at most `length` tokens; as in `DecoderModel`."""
        return self.model.make_cache(batch, length, dtype)

    def advance(
        self,
        input_ids: ArrayLike,
        cache: KVCache,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The last hidden states of further tokens and the cache with them in it; as in `DecoderModel`.

        A prompt needs the logits of its last tokens alone: `model.logits(hidden[:, -1])`.
        """
        return self.model.advance(input_ids, cache, attention_mask, position_ids)

    def step(
        self,
        input_ids: ArrayLike,
        cache: KVCache,
        attention_mask: ArrayLike | None = None,
        position_ids: ArrayLike | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """The logits of further tokens, float32 `[b, t, v]`, and the cache with them in it; as `advance`."""
        hidden, cache = self.advance(input_ids, cache, attention_mask, position_ids)
        return self.logits(hidden), cache
