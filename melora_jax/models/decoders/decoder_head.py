"""A decoder as a classifier: a dense layer on the last token, which alone has seen all others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from melora_jax.models.base import HuggingFaceModel
from melora_jax.models.decoders.layers import DecoderParts
from melora_jax.models.decoders.model import DecoderModel
from melora_jax.models.inputs import checked_mask


class DecoderForSequenceClassification(HuggingFaceModel):
    """A decoder with one dense layer, without bias, on the last token that is not padding.

    transformers finds that token by `pad_token_id` in config.json instead of by the mask: a checkpoint without one has
    to get one before transformers can serve a batch of it.

    Args:
      parts: makes the layers.
      num_labels: outputs of the head.
      remat: as in `DecoderModel`.
    """

    def __init__(self, parts: DecoderParts, num_labels: int, *, remat: str = "none") -> None:
        self.model = DecoderModel(parts, remat=remat, prefix="model/")
        self.score = parts.linear(parts.config.hidden_size, num_labels, bias=False, output_dtype=jnp.dtype(jnp.float32))

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The logits, float32 `[b, labels]`.

        Args:
          input_ids: whole numbers `[b, t]`.
          attention_mask: `[b, t]`, 0 at padding, left or right; without one the last token is that of the row.
          token_type_ids: must be None; decoders know no token types.
          key: PRNG key that turns dropout on; None leaves an outer `dropout_key` in force.

        Raises:
          ValueError: token types are given, shapes differ, or a known id is outside the vocabulary.
        """
        if token_type_ids is not None:
            raise ValueError("decoders have no token types and would ignore them; leave token_type_ids out")
        hidden = self.model(input_ids, attention_mask, key=key)
        if attention_mask is None:
            return self.score(hidden[:, -1])
        seen = checked_mask(attention_mask, hidden.shape[:2]) != 0
        last = hidden.shape[1] - 1 - jnp.argmax(seen[:, ::-1], axis=1)
        return self.score(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
