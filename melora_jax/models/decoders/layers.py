"""The layers of Llama, Mistral, Qwen and Gemma, module for module as Hugging Face names them.

Modules get their path with each call and store none, so that equal layers stay equal and can be stacked.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from melora_jax.models.activations import ACTIVATIONS
from melora_jax.models.decoders.config import DecoderConfig
from melora_jax.models.decoders.kv_cache import written
from melora_jax.models.decoders.masks import causal_attention
from melora_jax.models.decoders.rope import rotate
from melora_jax.nn.parallel import KernelCut, ParallelLinear, Table
from melora_jax.nn.sharding import constrain

KeyValue = tuple[jax.Array, jax.Array]


class Shared(NamedTuple):
    """What all layers of one type share in a pass.

    Attributes:
      cos, sin: float32 `[b or 1, t, k / 2]`, of the rotary embedding.
      mask: bool `[b or 1, 1, t, s]`; None if a token sees all earlier ones within the layer's window.
      first: int32, the place in the cache of the first token; 0 without a cache.
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None
    first: jax.Array


class RMSNorm(nnx.Module):
    """Root mean square normalisation, `x / √(mean(x²) + ε) · scale`, in float32; Gemma multiplies by `1 + scale`."""

    def __init__(self, size: int, epsilon: float, offset: float, dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.full((size,), 1.0 - offset, dtype))
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class TokenEmbedding(Table):
    """An embedding that, used as the output layer, gives float32 logits."""

    def attend(self, query: jax.Array, out_sharding: jax.P | None = None) -> jax.Array:
        """`query · embeddingᵀ`, `[..., d]` to float32 `[..., v]`."""
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        return KernelCut(None, self.num_embeddings).dot(query, embedding.T, output_dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class DecoderParts:
    """Makes the parts of a decoder: Flax layers whose parameters and computation share one dtype.

    Kernels and embeddings are drawn from N(0, initializer_range²), as in Hugging Face. `remat` says what the backward
    pass recomputes: "none", "dots" (all but products with kernels) or "full" (each layer from its input).
    """

    config: DecoderConfig
    dtype: jnp.dtype
    rngs: nnx.Rngs
    remat: str = "none"

    def linear(self, d_in: int, d_out: int, *, bias: bool, output_dtype: jnp.dtype | None = None) -> ParallelLinear:
        """A dense layer; its products are summed and returned in `output_dtype`, None for `dtype`."""
        return ParallelLinear(
            d_in,
            d_out,
            use_bias=bias,
            kernel_init=nnx.initializers.normal(self.config.initializer_range),
            dtype=self.dtype,
            param_dtype=self.dtype,
            preferred_element_type=output_dtype,
            rngs=self.rngs,
        )

    def embed(self) -> TokenEmbedding:
        """The table of the tokens' vectors."""
        return TokenEmbedding(
            self.config.vocab_size,
            self.config.hidden_size,
            embedding_init=nnx.initializers.normal(self.config.initializer_range),
            dtype=self.dtype,
            param_dtype=self.dtype,
            rngs=self.rngs,
        )

    def norm(self, size: int) -> RMSNorm:
        """The family's normalisation over `size` features."""
        return RMSNorm(size, self.config.norm_eps, 1.0 if self.config.gemma else 0.0, self.dtype)


class DecoderAttention(nnx.Module):
    """Query, key and value projections, rotary embedding, attention, and the output projection."""

    def __init__(self, parts: DecoderParts, window: int | None) -> None:
        sizes = parts.config
        self.sizes = sizes
        self.window = window
        queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.q_proj = parts.linear(sizes.hidden_size, queries, bias=sizes.qkv_bias)
        self.k_proj = parts.linear(sizes.hidden_size, keys, bias=sizes.qkv_bias)
        self.v_proj = parts.linear(sizes.hidden_size, keys, bias=sizes.qkv_bias)
        self.o_proj = parts.linear(queries, sizes.hidden_size, bias=sizes.output_bias)
        if sizes.qk_norm:
            self.q_norm = parts.norm(sizes.head_dim)
            self.k_norm = parts.norm(sizes.head_dim)

    def __call__(
        self, x: jax.Array, shared: Shared, cached: KeyValue | None, path: str
    ) -> tuple[jax.Array, KeyValue | None]:
        heads = (*x.shape[:2], -1, self.sizes.head_dim)
        query, key, value = (constrain(layer(x).reshape(heads), 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.sizes.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, shared.cos, shared.sin), rotate(key, shared.cos, shared.sin)
        if cached is not None:
            cached = (written(cached[0], key, shared.first), written(cached[1], value, shared.first))
            key, value = (kept.astype(x.dtype) for kept in cached)
        mixed = causal_attention(
            query,
            key,
            value,
            shared.mask,
            window=self.window,
            scale=self.sizes.attention_scale,
            softcap=self.sizes.attention_softcap,
            rate=self.sizes.attention_dropout,
            path=path,
        )
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cached


class DecoderMLP(nnx.Module):
    """The gated feed-forward half, `down(act(gate(x)) · up(x))`."""

    def __init__(self, parts: DecoderParts) -> None:
        sizes = parts.config
        self.activation = sizes.activation
        self.gate_proj = parts.linear(sizes.hidden_size, sizes.intermediate_size, bias=sizes.mlp_bias)
        self.up_proj = parts.linear(sizes.hidden_size, sizes.intermediate_size, bias=sizes.mlp_bias)
        self.down_proj = parts.linear(sizes.intermediate_size, sizes.hidden_size, bias=sizes.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One layer: attention, then feed-forward; each takes the normalised input and is added to it."""

    def __init__(self, parts: DecoderParts, window: int | None) -> None:
        self.self_attn = DecoderAttention(parts, window)
        self.mlp = DecoderMLP(parts)
        self.input_layernorm = parts.norm(parts.config.hidden_size)
        self.post_attention_layernorm = parts.norm(parts.config.hidden_size)

    def __call__(
        self, x: jax.Array, shared: Shared, cached: KeyValue | None, path: str
    ) -> tuple[jax.Array, KeyValue | None]:
        mixed, cached = self.self_attn(self.input_layernorm(x), shared, cached, f"{path}/self_attn")
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cached


class GemmaLayer(DecoderLayer):
    """A layer of Gemma 2 and 3, which also normalises what is added."""

    def __init__(self, parts: DecoderParts, window: int | None) -> None:
        super().__init__(parts, window)
        self.pre_feedforward_layernorm = parts.norm(parts.config.hidden_size)
        self.post_feedforward_layernorm = parts.norm(parts.config.hidden_size)

    def __call__(
        self, x: jax.Array, shared: Shared, cached: KeyValue | None, path: str
    ) -> tuple[jax.Array, KeyValue | None]:
        mixed, cached = self.self_attn(self.input_layernorm(x), shared, cached, f"{path}/self_attn")
        x = x + self.post_attention_layernorm(mixed)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed), cached
