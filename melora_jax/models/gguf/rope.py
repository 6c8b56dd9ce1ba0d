"""The RoPE scaling of the model in a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from melora_jax.models.gguf.reader import GGUFFile
from melora_jax.validation import positive, whole

ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's settings are in a file as the factors they come to; these and the factor are all that was ever published
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_scaling_of(file: GGUFFile, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of the config.json that a GGUF file stands for; None for the default RoPE.

    Args:
      file: the file.
      values: its hyperparameters, without their architecture's prefix.
      config: `model_type`, `head_dim` and `rope_theta` of that config.json.

    Raises:
      ValueError: the scaling is not supported, or a value is missing or impossible.
    """
    kind, where = values.get("rope.scaling.type", "none"), str(file.path)
    if ROPE_FACTORS in file.tensors:
        if kind != "none" or config["model_type"] not in ("llama", "mistral"):
            raise ValueError(f"{ROPE_FACTORS} in {where} is there beside another RoPE; use another model")
        return _llama3(file.read(ROPE_FACTORS), config, where)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type={kind!r:.99} in {where} is not supported, only none, linear and yarn")
    scaling = {"rope_type": kind, "factor": positive(values, "rope.scaling.factor", where)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = whole(values, "rope.scaling.original_context_length", where)
    return scaling


def _llama3(factors: np.ndarray, config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The settings of Llama 3's RoPE that come to `factors`, by which each pair of features turns slower."""
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
