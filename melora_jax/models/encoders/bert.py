"""BERT and RoBERTa bodies, module for module as Hugging Face names them.

Inner modules get their path with each call and store none, so that equal layers stay equal and can be stacked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.core.dropout import dropout
from melora_jax.models.activations import ACTIVATIONS
from melora_jax.models.encoders.config import EncoderBody, Parts, checked_types
from melora_jax.nn.attention import attention
from melora_jax.nn.scan_layers import Layers
from melora_jax.nn.sharding import constrain


class BertEmbeddings(nnx.Module):
    """Sum of word, token type and position embeddings, normalised."""

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config
        self.word_embeddings = parts.embed(parts.config.vocab_size)
        self.position_embeddings = parts.embed(parts.config.max_positions)
        self.token_type_embeddings = parts.embed(parts.config.type_vocab_size)
        self.LayerNorm = parts.layer_norm()

    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array | None, path: str) -> jax.Array:
        types = jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        x = x + self.position_embeddings(positions(input_ids, self.config.position_pad))
        return dropout(self.LayerNorm(constrain(x)), self.config.hidden_dropout, path)


def positions(input_ids: jax.Array, position_pad: int | None) -> jax.Array:
    """Rows of the position table, int32 `[1, t]` or `[b, t]`.

    Without `position_pad`, 0, 1, 2 ... With it, as in RoBERTa, tokens count from `position_pad + 1` and padding has
    `position_pad`.

    >>> positions(jnp.array([[5, 6, 1]]), None).tolist(), positions(jnp.array([[5, 6, 1]]), 1).tolist()
    ([[0, 1, 2]], [[2, 3, 1]])
    """
    if position_pad is None:
        return jnp.arange(input_ids.shape[1])[None]
    is_token = (input_ids != position_pad).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + position_pad


class BertSelfAttention(nnx.Module):
    """Query, key and value projections, and attention."""

    def __init__(self, parts: Parts) -> None:
        self.config = parts.config
        size = parts.config.hidden_size
        self.query = parts.linear(size, size)
        self.key = parts.linear(size, size)
        self.value = parts.linear(size, size)

    def __call__(self, x: jax.Array, bias: jax.Array | None, path: str) -> jax.Array:
        heads = (*x.shape[:2], self.config.num_heads, -1)
        query, key, value = (constrain(layer(x).reshape(heads), 2) for layer in (self.query, self.key, self.value))
        return attention(query, key, value, bias, self.config.attention_dropout, path).reshape(x.shape)


class BertResidual(nnx.Module):
    """A dense layer, dropout, the residual and layer normalisation, which end both halves of a layer."""

    def __init__(self, parts: Parts, d_in: int) -> None:
        self.config = parts.config
        self.dense = parts.linear(d_in, parts.config.hidden_size)
        self.LayerNorm = parts.layer_norm()

    def __call__(self, x: jax.Array, residual: jax.Array, path: str) -> jax.Array:
        return self.LayerNorm(dropout(self.dense(x), self.config.hidden_dropout, path) + residual)


class BertAttention(nnx.Module):
    """The attention half of a layer."""

    def __init__(self, parts: Parts) -> None:
        self.self = BertSelfAttention(parts)
        self.output = BertResidual(parts, parts.config.hidden_size)

    def __call__(self, x: jax.Array, bias: jax.Array | None, path: str) -> jax.Array:
        return self.output(self.self(x, bias, f"{path}/self"), x, f"{path}/output")


class BertIntermediate(nnx.Module):
    """The widening dense layer and its activation."""

    def __init__(self, parts: Parts) -> None:
        self.activation = parts.config.activation
        self.dense = parts.linear(parts.config.hidden_size, parts.config.intermediate_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](self.dense(x))


class BertLayer(nnx.Module):
    """One layer: attention, then the feed-forward half."""

    def __init__(self, parts: Parts) -> None:
        self.attention = BertAttention(parts)
        self.intermediate = BertIntermediate(parts)
        self.output = BertResidual(parts, parts.config.intermediate_size)

    def __call__(self, x: jax.Array, bias: jax.Array | None, path: str) -> jax.Array:
        x = self.attention(x, bias, f"{path}/attention")
        return self.output(self.intermediate(x), x, f"{path}/output")


class BertEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, parts: Parts) -> None:
        self.layer = Layers([BertLayer(parts) for _ in range(parts.config.num_layers)])

    def __call__(self, x: jax.Array, bias: jax.Array | None, path: str) -> jax.Array:
        return self.layer.run(x, lambda layer, x, number, path, _: (layer(x, bias, path), None), f"{path}/layer")[0]


class BertPooler(nnx.Module):
    """A dense layer and tanh on the first token's state."""

    def __init__(self, parts: Parts) -> None:
        self.dense = parts.linear(parts.config.hidden_size, parts.config.hidden_size)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        return jnp.tanh(self.dense(hidden[:, 0]))


class BertBody(EncoderBody):
    """Embeddings and layers of BERT or RoBERTa, without a pooler."""

    def __init__(self, parts: Parts, *, prefix: str = "") -> None:
        super().__init__(parts, prefix=prefix)
        self.embeddings = BertEmbeddings(parts)
        self.encoder = BertEncoder(parts)

    def encode(self, ids: jax.Array, token_type_ids: ArrayLike | None, bias: jax.Array | None) -> jax.Array:
        types = None if token_type_ids is None else checked_types(token_type_ids, self.sizes, ids.shape)
        x = self.embeddings(ids, types, f"{self.prefix}embeddings")
        return self.encoder(x, bias, f"{self.prefix}encoder")


class BertModel(BertBody):
    """BERT or RoBERTa with its pooler, which a head may apply to the last hidden states that the model returns."""

    def __init__(self, parts: Parts, *, prefix: str = "") -> None:
        super().__init__(parts, prefix=prefix)
        self.pooler = BertPooler(parts)
