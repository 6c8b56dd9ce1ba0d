"""The heads of a decoder: over the vocabulary, for all tokens or for new ones with a cache, and over labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.models.base import HuggingFaceModel, SequenceClassifier
from melora_jax.models.decoders.kv_cache import KVCache
from melora_jax.models.decoders.layers import DecoderParts
from melora_jax.models.decoders.model import DecoderModel
from melora_jax.models.inputs import checked_mask


class CausalLM(HuggingFaceModel):
    """A decoder with its head over the vocabulary; a tied head is the embedding.

    Args:
      parts: makes the layers.
    """

    def __init__(self, parts: DecoderParts) -> None:
        sizes = parts.config
        self.sizes = sizes
        self.model = DecoderModel(parts, prefix="model/")
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

        A prompt needs only the logits of its last tokens: `model.logits(hidden[:, -1])`.
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


class DecoderForSequenceClassification(SequenceClassifier):
    """A decoder with one dense layer, without bias, on the last token that is not padding; its logits are float32.

    transformers finds that token by `pad_token_id` in config.json instead of by the mask: a checkpoint without one
    needs one before transformers can run a batch.

    Args:
      parts: makes the layers.
      num_labels: outputs of the head.
    """

    def __init__(self, parts: DecoderParts, num_labels: int) -> None:
        self.model = DecoderModel(parts, prefix="model/")
        self.score = parts.linear(parts.config.hidden_size, num_labels, bias=False, output_dtype=jnp.dtype(jnp.float32))

    def classify(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, token_type_ids: ArrayLike | None
    ) -> jax.Array:
        if token_type_ids is not None:
            raise ValueError("decoders have no token types and would ignore them; leave token_type_ids out")
        hidden = self.model(input_ids, attention_mask)
        if attention_mask is None:
            return self.score(hidden[:, -1])
        seen = checked_mask(attention_mask, hidden.shape[:2]) != 0
        last = hidden.shape[1] - 1 - jnp.argmax(seen[:, ::-1], axis=1)
        return self.score(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
