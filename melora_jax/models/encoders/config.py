"""What all encoders share: hyperparameters from a Hugging Face configuration, the parts of modules, the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.models.activations import ACTIVATIONS
from melora_jax.models.base import HuggingFaceModel
from melora_jax.models.families import family_of
from melora_jax.models.inputs import checked_mask, dropout_on, matrix_of_whole_numbers, require_below, require_shape
from melora_jax.nn.attention import padding_bias
from melora_jax.nn.parallel import ParallelLinear, Table

_BERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "head_dropout": "classifier_dropout",
    "initializer_range": "initializer_range",
}
_DISTILBERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "activation": "activation",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "head_dropout": "seq_classif_dropout",
    "initializer_range": "initializer_range",
}
# (key, the values that we implement); a key that is absent is harmless
_SUPPORTED = (
    ("position_embedding_type", (None, "absolute")),
    ("is_decoder", (None, False)),
    ("is_encoder_decoder", (None, False)),
    ("add_cross_attention", (None, False)),
    ("pruned_heads", (None, {}, [])),
    ("quantization_config", (None, {})),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The hyperparameters of an encoder, under one set of names for all families.

    `position_pad` is the padding token's id in RoBERTa, whose positions count the other tokens from
    `position_pad + 1`; None in BERT, whose positions are 0, 1, 2 ...
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    head_dropout: float
    initializer_range: float = 0.02
    position_pad: int | None = None

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads: each query head has its own."""
        return self.num_heads

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.max_positions if self.position_pad is None else self.max_positions - self.position_pad - 1


def encoder_config(config: Mapping[str, Any], where: str = "config.json") -> EncoderConfig:
    """The hyperparameters in a Hugging Face configuration of a BERT, RoBERTa, XLM-R or DistilBERT.

    Args:
      config: the content of config.json, of transformers 4 or 5.
      where: its file, for errors.

    Raises:
      ValueError: the family or a feature is not supported, a size is missing, or a value is impossible.

    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13, pad_token_id=1)
    >>> encoder_config({"model_type": "roberta", **sizes}).max_length
    11
    """
    family = family_of(config, where)
    for key, supported in _SUPPORTED:
        if config.get(key) not in supported:
            raise ValueError(
                f"{key}={config[key]!r} in {where} is not supported, only {supported[1]!r}; use another model"
            )
    distilbert = family.prefix == "distilbert"
    keys = _DISTILBERT_KEYS if distilbert else _BERT_KEYS
    found = {ours: config[theirs] for ours, theirs in keys.items() if config.get(theirs) is not None}
    found.setdefault("head_dropout", 0.2 if distilbert else found.get("hidden_dropout", EncoderConfig.hidden_dropout))
    if family.prefix == "roberta":
        found["position_pad"] = config.get("pad_token_id", 1)
    for field in dataclasses.fields(EncoderConfig):
        if field.name not in found and field.default is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {keys[field.name]}, a {family.model_type} cannot be built without it")
        _require_valid(field, found, keys.get(field.name, "pad_token_id"), where)
    sizes = EncoderConfig(**found)
    if sizes.hidden_size % sizes.num_heads:
        raise ValueError(
            f"{keys['num_heads']}={sizes.num_heads} does not divide {keys['hidden_size']}={sizes.hidden_size}"
            f" in {where}; correct the one that is wrong"
        )
    return sizes


def _require_valid(field: dataclasses.Field, found: dict[str, Any], key: str, where: str) -> None:
    value = found.get(field.name, field.default)
    if field.name == "position_pad":
        if "position_pad" in found and (not isinstance(value, int) or value < 0):
            raise ValueError(f"{key}={value!r} in {where}; positions are counted from it, so it must be a whole number")
    elif field.type == "int":
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r} in {where} must be a whole number of at least 1")
    elif field.name.endswith("dropout"):
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"{key}={value!r} in {where} must be a probability in [0, 1)")
    elif field.type == "float":
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{key}={value!r} in {where} must be a positive number")
    elif value not in ACTIVATIONS:
        raise ValueError(f"{key}={value!r} in {where} is not supported; choose from {', '.join(ACTIVATIONS)}")


@dataclasses.dataclass(frozen=True)
class Parts:
    """Makes the parts of an encoder: Flax layers whose parameters and computation share one dtype.

    Kernels and embeddings are drawn from N(0, initializer_range²), as in Hugging Face.
    """

    config: EncoderConfig
    dtype: jnp.dtype
    rngs: nnx.Rngs

    def linear(self, d_in: int, d_out: int) -> ParallelLinear:
        """A dense layer with bias."""
        normal = nnx.initializers.normal(self.config.initializer_range)
        return ParallelLinear(d_in, d_out, kernel_init=normal, dtype=self.dtype, param_dtype=self.dtype, rngs=self.rngs)

    def embed(self, count: int) -> Table:
        """A table of `count` vectors of the hidden size."""
        normal = nnx.initializers.normal(self.config.initializer_range)
        size = self.config.hidden_size
        return Table(count, size, embedding_init=normal, dtype=self.dtype, param_dtype=self.dtype, rngs=self.rngs)

    def layer_norm(self) -> nnx.LayerNorm:
        """Layer normalisation over the hidden size; its statistics are float32 whatever the dtype."""
        return nnx.LayerNorm(
            self.config.hidden_size,
            epsilon=self.config.layer_norm_eps,
            use_fast_variance=False,  # E[x²] - E[x]² loses digits and is not faster
            dtype=self.dtype,
            param_dtype=self.dtype,
            rngs=self.rngs,
        )


class EncoderBody(HuggingFaceModel):
    """An encoder without a head: token ids to the last hidden states.

    Args:
      parts: makes the layers.
      prefix: the beginning of its variables' paths inside a model with a head, such as "bert/"; "" on its own.
    """

    def __init__(self, parts: Parts, *, prefix: str = "") -> None:
        self.sizes = parts.config
        self.prefix = prefix

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        *,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """The last hidden states, `[b, t, d]`.

        Args:
          input_ids: whole numbers `[b, t]`.
          attention_mask: `[b, t]`, 0 at padding; None without padding.
          token_type_ids: whole numbers `[b, t]`; None for zeros. DistilBERT has no token types, and takes only None.
          key: PRNG key that turns dropout on; None leaves an outer `dropout_key` in force.

        Raises:
          ValueError: DistilBERT is given token types, the sequence is too long, shapes differ, or a known id is outside
            its table.
        """
        ids = checked_ids(input_ids, self.sizes, f"{self.prefix}embeddings/position_embeddings")
        bias = None if attention_mask is None else padding_bias(checked_mask(attention_mask, ids.shape))
        with dropout_on(key):
            return self.encode(ids, token_type_ids, bias)

    def encode(self, ids: jax.Array, token_type_ids: ArrayLike | None, bias: jax.Array | None) -> jax.Array:
        """The last hidden states of checked ids, with the dropout key in force."""
        raise NotImplementedError


def checked_ids(ids: ArrayLike, config: EncoderConfig, where: str) -> jax.Array:
    """Token ids as an array `[b, t]`.

    Raises:
      ValueError: they are not whole numbers `[b, t]`, too long for the position table, or, where their values are
        known (outside a trace), outside the vocabulary.
    """
    array = matrix_of_whole_numbers("input_ids", ids)
    if not 1 <= array.shape[1] <= config.max_length:
        raise ValueError(
            f"input_ids hold {array.shape[1]} tokens a row, {where} has positions for 1 to {config.max_length};"
            f" truncate in the tokenizer with max_length={config.max_length}"
        )
    require_below(array, config.vocab_size, "input_ids", "vocab_size", "use the tokenizer of this checkpoint")
    return array


def checked_types(ids: ArrayLike, config: EncoderConfig, shape: tuple[int, ...]) -> jax.Array:
    """Token types as an array `[b, t]`.

    Raises:
      ValueError: their shape is not that of the token ids, or a known value is outside the table.
    """
    array = matrix_of_whole_numbers("token_type_ids", ids)
    require_shape("token_type_ids", array, shape)
    require_below(array, config.type_vocab_size, "token_type_ids", "type_vocab_size", "leave token_type_ids out")
    return array
