"""Tiny decoder checkpoints of every family and RoPE kind, and transformers' models of the same tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.models import Model, model_from_config
from melora_jax.nn.tree import variables_of
from tests.support.models_fixtures import tensors_of, write_checkpoint

VOCAB, TOKENS = 101, 19
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 38,
    "max_position_embeddings": 23,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
_LLAMA3 = {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 5, "query_pre_attn_scalar": 13}
# Configurations as transformers 4 writes them; its 5 is had from it, by loading and saving.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "rope_theta": 5e5, "rope_scaling": None, "tie_word_embeddings": False},
    "llama-first": {
        "model_type": "llama",
        **{key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")},
        "hidden_size": 36,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm2": {
        "model_type": "llama",
        **SIZES,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "is_llama_config": True,
    },
    "linear": {"model_type": "llama", **SIZES, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {
        "model_type": "llama",
        **SIZES,
        "max_position_embeddings": 11,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "llama3": {
        "model_type": "llama",
        **SIZES,
        "max_position_embeddings": 193,
        "rope_theta": 1e4,
        "rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 97},
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 5, "rope_theta": 1e4, "tie_word_embeddings": False},
    "mistral-full": {"model_type": "mistral", **SIZES, "sliding_window": None, "rope_theta": 1e6},
    "qwen2": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "yarn": {
        "model_type": "qwen2",
        **SIZES,
        "max_position_embeddings": 997,
        "use_sliding_window": False,
        "sliding_window": 5,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 997},
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        **SIZES,
        "attention_bias": False,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "model_type": "gemma2",
        **SIZES,
        **_GEMMA,
        "hidden_act": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 1.7,
        "final_logit_softcapping": 2.9,
        "rope_theta": 1e4,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **SIZES,
        **_GEMMA,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
}
NAMES = list(CONFIGS)
# one of each way to look back: everything, a window in all or some layers, capped scores, two RoPEs
FAMILIES = ["smollm2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]

apply = nnx.jit(lambda model, *inputs, **named: model(*inputs, **named))


def token_ids(rows: int = 3, tokens: int = TOKENS, seed: int = 7) -> np.ndarray:
    """Random ids `[rows, tokens]`."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, tokens)).astype(np.int32)


def padded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and positions `[3, 19]`: a full row, one padded left by 5 and one padded right by 7."""
    mask = np.ones((3, TOKENS), np.int32)
    mask[1, :5] = 0
    mask[2, -7:] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) * mask
    return np.where(mask == 1, token_ids(), 0).astype(np.int32), mask, positions.astype(np.int32)


def random_decoder(name: str, changes: Mapping[str, Any] | None = None, **arguments: Any) -> Model:
    """A model with every variable, biases and norms too, drawn at random."""
    config = CONFIGS[name] | (changes or {})
    model = nnx.eval_shape(lambda: model_from_config(config, **({"task": "causal-lm"} | arguments)))
    one = 0.0 if config["model_type"].startswith("gemma") else 1.0
    rng = np.random.default_rng(11)
    for path, variable in sorted(variables_of(model).items()):
        drawn = 0.12 * rng.standard_normal(variable.shape) + (one if path.endswith("/scale") else 0.0)
        variable.set_value(jnp.asarray(drawn, variable.dtype))
    return model


def checkpoint(folder: Path, name: str, changes: Mapping[str, Any] | None = None) -> Path:
    """A random checkpoint with a configuration of transformers 4."""
    tensors = tensors_of(random_decoder(name, changes))
    return write_checkpoint(folder, CONFIGS[name] | (changes or {}), tensors)


def torch_decoder(folder: Path, task: str = "causal-lm") -> tuple[Any, dict[str, Any]]:
    """transformers' model of a folder, and what it says of missing, unexpected and mismatched tensors."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = {
        "encoder": transformers.AutoModel,
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
    }[task]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = auto.from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", dtype="float32"
        )
    return model.eval(), info


def torch_run(model: Any, *inputs: np.ndarray | None) -> np.ndarray:
    """Logits, or last hidden states, for ids, mask and positions."""
    import torch

    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        given = {n: torch.from_numpy(v).long() for n, v in zip(names, inputs, strict=False) if v is not None}
        output = model(**given)
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()
