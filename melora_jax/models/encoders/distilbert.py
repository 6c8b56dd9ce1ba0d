"""DistilBERT's body, module for module as Hugging Face names it."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.core.dropout import dropout
from melora_jax.models.activations import ACTIVATIONS
from melora_jax.models.encoders.bert import positions
from melora_jax.models.encoders.config import EncoderBody, Parts
from melora_jax.nn.attention import attention
from melora_jax.nn.scan_layers import Layers
from melora_jax.nn.sharding import constrain


class DistilBertEmbeddings(nnx.Module):
    """Sum of word and position embeddings, normalised."""

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config
        self.word_embeddings = parts.embed(parts.config.vocab_size)
        self.position_embeddings = parts.embed(parts.config.max_positions)
        self.LayerNorm = parts.layer_norm()

    def __call__(self, input_ids: jax.Array, path: str) -> jax.Array:
        x = self.word_embeddings(input_ids) + self.position_embeddings(positions(input_ids, None))
        return dropout(self.LayerNorm(constrain(x)), self.config.hidden_dropout, path)


class DistilBertSelfAttention(nnx.Module):
    """Query, key, value and output projections, and attention."""

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config
        size = parts.config.hidden_size
        self.q_lin = parts.linear(size, size)
        self.k_lin = parts.linear(size, size)
        self.v_lin = parts.linear(size, size)
        self.out_lin = parts.linear(size, size)

    def __call__(self, x: jax.Array, bias: jax.Array | None, path: str) -> jax.Array:
        heads = (*x.shape[:2], self.config.num_heads, -1)
        query, key, value = (constrain(layer(x).reshape(heads), 2) for layer in (self.q_lin, self.k_lin, self.v_lin))
        return self.out_lin(attention(query, key, value, bias, self.config.attention_dropout, path).reshape(x.shape))


class DistilBertFeedForward(nnx.Module):
    """Two dense layers with the activation between them."""

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config
        self.lin1 = parts.linear(parts.config.hidden_size, parts.config.intermediate_size)
        self.lin2 = parts.linear(parts.config.intermediate_size, parts.config.hidden_size)

    def __call__(self, x: jax.Array, path: str) -> jax.Array:
        x = self.lin2(ACTIVATIONS[self.config.activation](self.lin1(x)))
        return dropout(x, self.config.hidden_dropout, path)


class DistilBertLayer(nnx.Module):
    """One layer: attention, then the feed-forward half."""

    def __init__(self, parts: Parts) -> None:
        self.attention = DistilBertSelfAttention(parts)
        self.sa_layer_norm = parts.layer_norm()
        self.ffn = DistilBertFeedForward(parts)
        self.output_layer_norm = parts.layer_norm()

    def __call__(self, x: jax.Array, bias: jax.Array | None, path: str) -> jax.Array:
        x = self.sa_layer_norm(self.attention(x, bias, f"{path}/attention") + x)
        return self.output_layer_norm(self.ffn(x, f"{path}/ffn") + x)


class DistilBertTransformer(nnx.Module):
    """The stack of layers."""

    def __init__(self, parts: Parts) -> None:
        self.layer = Layers([DistilBertLayer(parts) for _ in range(parts.config.num_layers)])

    def __call__(self, x: jax.Array, bias: jax.Array | None, path: str) -> jax.Array:
        return self.layer.run(x, lambda layer, x, number, path, _: (layer(x, bias, path), None), f"{path}/layer")[0]


class DistilBertModel(EncoderBody):
    """DistilBERT without a head."""

    def __init__(self, parts: Parts, *, prefix: str = "") -> None:
        super().__init__(parts, prefix=prefix)
        self.embeddings = DistilBertEmbeddings(parts)
        self.transformer = DistilBertTransformer(parts)

    def encode(self, ids: jax.Array, token_type_ids: ArrayLike | None, bias: jax.Array | None) -> jax.Array:
        if token_type_ids is not None:
            raise ValueError("DistilBERT has no token types and would ignore them; leave token_type_ids out")
        x = self.embeddings(ids, f"{self.prefix}embeddings")
        return self.transformer(x, bias, f"{self.prefix}transformer")
