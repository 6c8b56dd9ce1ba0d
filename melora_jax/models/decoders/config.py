"""The hyperparameters of a decoder, under one set of names for all families, from a Hugging Face configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from melora_jax.models.activations import ACTIVATIONS
from melora_jax.models.decoders.rope import Rope, rope_from
from melora_jax.models.families import family_of
from melora_jax.validation import flag, number, positive, whole

# (key, the values that we implement); a key that is absent is harmless
_SUPPORTED = (
    ("quantization_config", (None, {})),
    ("use_bidirectional_attention", (None, False)),
    ("rope_interleaved", (None, False)),
    ("partial_rotary_factor", (None, 1)),
    ("add_cross_attention", (None, False)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The hyperparameters of a decoder.

    `layer_types` is "full_attention" or "sliding_attention" for each layer, `ropes` the rotary embedding of each type
    that occurs, `window` how many tokens a sliding layer sees, the query's own included.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_length: int
    activation: str
    norm_eps: float
    attention_dropout: float
    initializer_range: float
    tied: bool
    layer_types: tuple[str, ...]
    window: int | None
    ropes: tuple[tuple[str, Rope], ...]
    attention_scale: float
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False

    def window_of(self, layer: int) -> int | None:
        """How many tokens layer number `layer` sees; None for all."""
        return self.window if self.layer_types[layer] == SLIDING else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Traits:
    """What a model type implies without its configuration saying so."""

    activation_key: str = "hidden_act"
    activation: str = "silu"
    head_dim: int | None = None
    tied: bool = False
    qkv_bias: bool | None = None
    has_attention_bias: bool = True
    has_mlp_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    softcaps: tuple[float | None, float | None] = (None, None)
    theta: float = 10_000.0


_GEMMA = {"activation_key": "hidden_activation", "activation": "gelu_pytorch_tanh", "head_dim": 256, "tied": True}
_TRAITS: dict[str, _Traits] = {
    "llama": _Traits(has_mlp_bias=True),
    "mistral": _Traits(has_attention_bias=False),
    "qwen2": _Traits(qkv_bias=True, has_attention_bias=False),
    "qwen3": _Traits(head_dim=128, qk_norm=True),
    "gemma2": _Traits(gemma=True, softcaps=(50.0, 30.0), **_GEMMA),
    "gemma3_text": _Traits(gemma=True, qk_norm=True, theta=1_000_000.0, **_GEMMA),
}


def decoder_config(config: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The hyperparameters in a Hugging Face configuration of a Llama, Mistral, Qwen or Gemma.

    Args:
      config: the content of config.json, of transformers 4 or 5.
      where: its file, for errors.

    Raises:
      ValueError: the family or a feature is not supported, a size is missing, or a value is impossible.

    >>> sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> decoder_config({"model_type": "llama", **sizes}).head_dim
    4
    """
    model_type = family_of(config, where).model_type
    traits = _TRAITS[model_type]
    for key, supported in _SUPPORTED:
        if config.get(key) not in supported:
            raise ValueError(
                f"{key}={config[key]!r} in {where} is not supported, only {supported[1]!r}; use another model"
            )
    layers, heads = whole(config, "num_hidden_layers", where), whole(config, "num_attention_heads", where)
    head_dim = _head_dim(config, traits, heads, where)
    window = window_from(config, model_type, where)
    types = layer_types_of(config, model_type, layers, window, where)
    limit = whole(config, "max_position_embeddings", where)
    has_bias = traits.has_attention_bias and flag(config, "attention_bias", where, False)
    attention_softcap, logit_softcap = _softcaps(config, model_type, where)
    query_size = positive(config, "query_pre_attn_scalar", where, 256.0) if traits.gemma else head_dim
    return DecoderConfig(
        vocab_size=whole(config, "vocab_size", where),
        hidden_size=whole(config, "hidden_size", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_kv_heads(config, model_type, heads, where),
        head_dim=head_dim,
        intermediate_size=whole(config, "intermediate_size", where),
        max_length=limit,
        activation=_activation(config, traits, where),
        norm_eps=positive(config, "rms_norm_eps", where, 1e-6),
        attention_dropout=_probability(config, "attention_dropout", where),
        initializer_range=positive(config, "initializer_range", where, 0.02),
        tied=flag(config, "tie_word_embeddings", where, traits.tied),
        layer_types=types,
        window=window if SLIDING in types else None,
        ropes=tuple((kind, _rope(config, model_type, kind, head_dim, limit, where)) for kind in dict.fromkeys(types)),
        attention_scale=query_size**-0.5,
        attention_softcap=attention_softcap,
        logit_softcap=logit_softcap,
        qkv_bias=has_bias if traits.qkv_bias is None else traits.qkv_bias,
        output_bias=has_bias,
        mlp_bias=traits.has_mlp_bias and flag(config, "mlp_bias", where, False),
        qk_norm=traits.qk_norm,
        gemma=traits.gemma,
    )


def _head_dim(config: Mapping[str, Any], traits: _Traits, heads: int, where: str) -> int:
    if config.get("head_dim") is not None or traits.head_dim is not None:
        return whole(config, "head_dim", where, traits.head_dim)
    size = whole(config, "hidden_size", where)
    if size % heads:
        raise ValueError(
            f"num_attention_heads={heads} does not divide hidden_size={size} in {where}; correct the one that is wrong"
        )
    return size // heads


def _kv_heads(config: Mapping[str, Any], model_type: str, heads: int, where: str) -> int:
    # the first Llama does not have this key; in other families its absence means different numbers
    absent = "num_key_value_heads" not in config and model_type != "llama"
    count = whole(config, "num_key_value_heads", where, None if absent else heads)
    if heads % count:
        raise ValueError(
            f"num_key_value_heads={count} does not divide num_attention_heads={heads} in {where};"
            " correct the one that is wrong"
        )
    return count


def _activation(config: Mapping[str, Any], traits: _Traits, where: str) -> str:
    name = config.get(traits.activation_key) or traits.activation
    if name not in ACTIVATIONS:
        raise ValueError(
            f"{traits.activation_key}={name!r} in {where} is not supported; choose from {', '.join(ACTIVATIONS)}"
        )
    return name


def _probability(config: Mapping[str, Any], key: str, where: str) -> float:
    value = number(config, key, where, 0.0)
    if not 0 <= value < 1:
        raise ValueError(f"{key}={config[key]!r} in {where} must be a probability in [0, 1)")
    return value


def _softcaps(config: Mapping[str, Any], model_type: str, where: str) -> tuple[float | None, float | None]:
    """Of the attention scores and of the logits. An absent key takes the family's default; null means none."""
    traits = _TRAITS[model_type]
    if not traits.gemma:
        return None, None
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    given = {key: config.get(key, default) for key, default in zip(keys, traits.softcaps, strict=True)}
    if model_type == "gemma3_text" and given[keys[0]] is not None:
        raise ValueError(f"{keys[0]}={given[keys[0]]!r} in {where} is not used by gemma3_text; set it to null")
    attention, logits = (None if given[key] is None else positive(given, key, where) for key in keys)
    return attention, logits


def _rope(config: Mapping[str, Any], model_type: str, kind: str, size: int, limit: int, where: str) -> Rope:
    """The rotary embedding of the layers of one type: Gemma 3 has one for each type, others have one for all."""
    theta = positive(config, "rope_theta", where, _TRAITS[model_type].theta)
    given = config.get("rope_parameters") or {}
    nested = isinstance(given, dict) and any(name in given for name in (FULL, SLIDING))
    if not isinstance(given, dict) or (given and nested != (model_type == "gemma3_text")):
        layout = f"one object for each of {FULL} and {SLIDING}" if model_type == "gemma3_text" else "one flat object"
        raise ValueError(f"rope_parameters={given!r} in {where} must be {layout} for {model_type}; correct it")
    parameters = dict((given.get(kind) if nested else given) or {})
    if kind == FULL or model_type != "gemma3_text":
        parameters |= config.get("rope_scaling") or {}
    else:
        theta = positive(config, "rope_local_base_freq", where, 10_000.0)
    if config.get("original_max_position_embeddings") is not None:
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope_from(parameters, size=size, theta=theta, limit=limit, where=where)


FULL, SLIDING = "full_attention", "sliding_attention"


def window_from(config: Mapping[str, Any], model_type: str, where: str) -> int | None:
    """How many tokens a sliding layer sees, the query's own included; None if no window is in use.

    Raises:
      ValueError: it is not a whole number.

    >>> window_from({"sliding_window": 32, "use_sliding_window": False}, "qwen2", "config.json") is None
    True
    """
    if model_type == "llama" or (
        model_type.startswith("qwen") and not flag(config, "use_sliding_window", where, False)
    ):
        return None
    if config.get("sliding_window", 4096) is None:
        return None
    return whole(config, "sliding_window", where, 4096)


def layer_types_of(
    config: Mapping[str, Any], model_type: str, layers: int, window: int | None, where: str
) -> tuple[str, ...]:
    """The type of each layer, from `layer_types` or the keys that transformers 4 derives them from.

    Args:
      config: the content of config.json.
      model_type: the family's.
      layers: number of layers.
      window: from `window_from`.
      where: the file, for errors.

    Raises:
      ValueError: they do not fit the number of layers, the family or the window.

    >>> layer_types_of({}, "gemma2", 3, 32, "config.json")
    ('sliding_attention', 'full_attention', 'sliding_attention')
    """
    default = _default_types(config, model_type, layers, window, where)
    types = default if config.get("layer_types") is None else config["layer_types"]
    if not isinstance(types, list | tuple) or len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise ValueError(
            f"layer_types={types!r} in {where} must name {FULL} or {SLIDING} for each of the {layers} layers"
        )
    if model_type in ("llama", "mistral") and tuple(types) != default:
        raise ValueError(
            f"layer_types in {where} mix full and sliding attention, which {model_type} does not have; use another"
            " model"
        )
    if SLIDING in types and window is None:
        raise ValueError(f"layer_types in {where} name {SLIDING}, but no sliding_window is in use; set both or neither")
    return tuple(types)


def _default_types(
    config: Mapping[str, Any], model_type: str, layers: int, window: int | None, where: str
) -> tuple[str, ...]:
    if model_type.startswith("gemma"):
        period = 2 if model_type == "gemma2" else whole(config, "sliding_window_pattern", where, 6)
        return tuple(FULL if (index + 1) % period == 0 else SLIDING for index in range(layers))
    if window is None:
        return (FULL,) * layers
    first = int(number(config, "max_window_layers", where, 28)) if model_type.startswith("qwen") else 0
    return tuple(SLIDING if index >= first else FULL for index in range(layers))
