"""The Hugging Face configuration of the model in a GGUF file, from the file's hyperparameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from melora_jax.models.decoders.config import FULL, SLIDING
from melora_jax.models.gguf.reader import GGUFFile, gguf_package
from melora_jax.validation import positive, whole

_NORM_EPS, _KEY, _VALUE = "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length"
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_LOCAL_BASE = "rope.freq_base_swa"
_ATTENTION_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"
_READ = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    _KEY,
    _VALUE,
    _NORM_EPS,
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
# hyperparameters that change nothing at these values
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
}
# what ends a turn if a file with a chat template does not say
_TURN_ENDS = ("<end_of_turn>", "<|eot_id|>", "<|im_end|>")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Hugging Face's names of modules: outside the layers, and in the layers of the families that have them
_TOP = ("model.embed_tokens", "model.norm", "lm_head")
_LAYER = (
    "input_layernorm",
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
ROPE_FACTORS = "rope_freqs.weight"
# a file holds the factors that Llama 3's settings give; all published models have these settings, with any factor
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What `general.architecture` stands for.

    Attributes:
      model_type: its Hugging Face name.
      read: the hyperparameters that it has in addition to those that all have.
      gemma_period: every layer of Gemma whose number, from 1, is a multiple of it has full attention; 0 for others.
      wide_layers: the number of layers of the 27-billion Gemma, which scales its scores by another size.
    """

    model_type: str
    read: frozenset[str] = frozenset()
    gemma_period: int = 0
    wide_layers: int | None = None


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", read=frozenset({_WINDOW})),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(model_type="qwen3"),
    "gemma2": Architecture(
        model_type="gemma2",
        read=frozenset({_WINDOW, _ATTENTION_CAP, _LOGIT_CAP}),
        gemma_period=2,
        wide_layers=46,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        read=frozenset({_WINDOW, _PATTERN, _LOCAL_BASE}),
        gemma_period=6,
        wide_layers=62,
    ),
}


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture of the file's model.

    Raises:
      ValueError: it is not supported.
    """
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"general.architecture={name!r:.99} in {file.path} is not supported; choose a model of {known}"
        )
    return ARCHITECTURES[name]


def modules_of(architecture: str) -> dict[str, str]:
    """The Hugging Face name of each module outside the layers and in layer 0, by its name in a GGUF file.

    Args:
      architecture: `general.architecture`, one of ARCHITECTURES.

    >>> modules_of("llama")["blk.0.attn_q"]
    'model.layers.0.self_attn.q_proj'
    """
    gguf = gguf_package()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, 1)
    found = {name: known.get_name(name) for name in (*_TOP, *(f"model.layers.0.{module}" for module in _LAYER))}
    # the package knows no head for families that tie it to the embedding
    return {ours: name for name, ours in found.items() if ours} | {_HEAD.removesuffix(".weight"): "lm_head"}


def config_from_gguf(file: GGUFFile, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """The content of the config.json that the model in a GGUF file would have.

    What the format leaves out is filled in as in llama.cpp: Gemma's pattern of local layers, their RoPE base, and the
    size that its scores are scaled by. The format calls a Mistral a llama; it is read as one if no window is named.

    Args:
      file: the file.
      rope_factors: the tensor ROPE_FACTORS; None if the file has none.

    Raises:
      ValueError: the architecture or a hyperparameter is not supported, one is missing, or they do not fit the tensors.
    """
    known, where = architecture_of(file), str(file.path)
    prefix = f"{file.fields['general.architecture']}."
    values = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    for key, value in values.items():
        if key not in _READ | known.read and value not in _NEUTRAL.get(key, ()):
            raise ValueError(
                f"{prefix + key!r:.99} in {where}, of value {value!r:.99}, is not supported; use another model"
            )
        if isinstance(value, list) and key != _PATTERN:
            raise ValueError(
                f"{prefix}{key} in {where} differs from layer to layer, which is not supported; use another"
            )
    if _EMBEDDING not in file.tensors:
        raise ValueError(f"{where} lacks the tensor {_EMBEDDING}: it holds a vocabulary or an adapter, not a model")
    if whole(values, "block_count", where) > len(file.tensors):
        raise ValueError(f"{where} has {values['block_count']} layers in {len(file.tensors)} tensors; fetch it again")
    config = _sizes(values, where) | {"vocab_size": _vocabulary(file, values), **_token_ids(file)}
    config |= {"model_type": known.model_type, "dtype": "float32", "tie_word_embeddings": _HEAD not in file.tensors}
    config |= _biases(file, known)
    config["rope_scaling"] = rope_scaling_of(values, config, rope_factors, where)
    if known.gemma_period:
        config |= _gemma(values, known, config, where)
    elif _WINDOW in values:
        config |= {"model_type": "mistral", "sliding_window": whole(values, _WINDOW, where)}
    return config


def _sizes(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads, hidden = whole(values, "attention.head_count", where), whole(values, "embedding_length", where)
    head_dim = whole(values, _KEY, where, max(hidden // heads, 1))
    for key in (_VALUE, "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{key}={values[key]!r:.99} in {where} is not the size of its heads, {head_dim}; use another model"
            )
    return {
        "hidden_size": hidden,
        "intermediate_size": whole(values, "feed_forward_length", where),
        "num_hidden_layers": whole(values, "block_count", where),
        "num_attention_heads": heads,
        "num_key_value_heads": whole(values, "attention.head_count_kv", where, heads),
        "head_dim": head_dim,
        "max_position_embeddings": whole(values, "context_length", where),
        "rms_norm_eps": positive(values, _NORM_EPS, where),
        "rope_theta": positive(values, "rope.freq_base", where, 10_000.0),
    }


def _vocabulary(file: GGUFFile, values: Mapping[str, Any]) -> int:
    rows = file.tensors[_EMBEDDING].shape[0]
    tokens = len(_tokens(file))
    if tokens > rows or values.get("vocab_size", rows) != rows:
        raise ValueError(
            f"{_EMBEDDING} in {file.path} has {rows} rows for {tokens} tokens and a vocab_size of"
            f" {values.get('vocab_size', rows)!r}; fetch the file again"
        )
    return rows


def _tokens(file: GGUFFile) -> list[Any]:
    tokens = file.fields.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list):
        raise ValueError(f"tokenizer.ggml.tokens in {file.path} is not a list; fetch the file again")
    return tokens


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    """The ids of special tokens; `eos_token_id` lists the token that ends a turn too, as in transformers."""
    found = {key: file.fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "padding")}
    tokens = _tokens(file)
    if found["eot"] is None and "tokenizer.chat_template" in file.fields:
        found["eot"] = next((tokens.index(name) for name in _TURN_ENDS if name in tokens), None)
    for key, value in found.items():
        if value is not None and (type(value) is not int or not 0 <= value < max(len(tokens), 1)):
            raise ValueError(
                f"tokenizer.ggml.{key}_token_id={value!r:.99} in {file.path} is not a token; fetch the file again"
            )
    ends = [end for end in dict.fromkeys((found["eos"], found["eot"])) if end is not None]
    ids = {"bos_token_id": found["bos"], "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
    return ids | {"pad_token_id": found["padding"]}


def _biases(file: GGUFFile, known: Architecture) -> dict[str, bool]:
    if known.model_type != "llama":
        return {}
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def _gemma(values: Mapping[str, Any], known: Architecture, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    size = config["hidden_size"] / heads if layers == known.wide_layers else config["head_dim"]
    gemma = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(size) if float(size).is_integer() else size,
        "sliding_window": whole(values, _WINDOW, where),
        "layer_types": _layer_types(values, known, layers, where),
    }
    if known.model_type == "gemma3_text":
        return gemma | {"rope_local_base_freq": positive(values, _LOCAL_BASE, where, 10_000.0)}
    caps = {_ATTENTION_CAP: 50.0, _LOGIT_CAP: 30.0}
    return gemma | {key: positive(values, key, where, default) for key, default in caps.items()}


def _layer_types(values: Mapping[str, Any], known: Architecture, layers: int, where: str) -> list[str]:
    pattern = values.get(_PATTERN)
    if not isinstance(pattern, list):
        period = known.gemma_period if pattern is None else whole(values, _PATTERN, where)
        pattern = [(layer + 1) % period != 0 for layer in range(layers)]
    if len(pattern) != layers or not all(isinstance(local, bool) for local in pattern):
        raise ValueError(f"{_PATTERN}={pattern!r:.99} in {where} must be true or false for each of the {layers} layers")
    return [SLIDING if local else FULL for local in pattern]


def rope_scaling_of(
    values: Mapping[str, Any], config: Mapping[str, Any], factors: np.ndarray | None, where: str
) -> dict[str, Any] | None:
    """`rope_scaling` of the config.json that a GGUF file stands for; None for the default RoPE.

    Args:
      values: its hyperparameters, without their architecture's prefix.
      config: `model_type`, `head_dim` and `rope_theta` of that config.json.
      factors: the tensor ROPE_FACTORS; None if the file has none.
      where: the file, for errors.

    Raises:
      ValueError: the scaling is not supported, or a value is missing or impossible.
    """
    kind = values.get("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none" or config["model_type"] != "llama":
            raise ValueError(f"{ROPE_FACTORS} in {where} contradicts the RoPE that the file names; use another model")
        return _llama3(factors, config, where)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type={kind!r:.99} in {where} is not supported, only none, linear and yarn")
    scaling = {"rope_type": kind, "factor": positive(values, "rope.scaling.factor", where)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = whole(values, "rope.scaling.original_context_length", where)
    return scaling


def _llama3(factors: np.ndarray, config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The settings of Llama 3's RoPE that give `factors`, by which each pair of features turns more slowly."""
    factor, pair = float(factors.max(initial=1.0)), np.arange(factors.size)
    turns = _LLAMA3["original_max_position_embeddings"] / (2 * math.pi)
    turns = turns * config["rope_theta"] ** -(2 * pair / config["head_dim"])
    kept = (turns - _LLAMA3["low_freq_factor"]) / (_LLAMA3["high_freq_factor"] - _LLAMA3["low_freq_factor"])
    kept = np.clip(kept, 0.0, 1.0)
    expected = 1.0 / (kept + (1.0 - kept) / factor)
    if 2 * factors.size != config["head_dim"] or not np.allclose(factors.ravel(), expected, rtol=1e-4, atol=0.0):
        raise ValueError(
            f"{ROPE_FACTORS} in {where} are not the factors of Llama 3.1, 3.2 or 3.3 ({_LLAMA3}); use another model"
        )
    return None if factor == 1.0 else {"rope_type": "llama3", "factor": factor, **_LLAMA3}
