"""Tiny GGUF files, written from Hugging Face tensors as llama.cpp's converter writes them, by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Each case: the decoder of decoder_fixtures, and its changes to what a GGUF file can say.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama-first", {"tie_word_embeddings": False}),
    "smollm2": ("smollm2", {}),
    "linear": ("linear", {}),
    "llama3": (
        "llama3",
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "yarn": ("yarn", {}),
    "qwen3": ("qwen3", {"use_sliding_window": False, "sliding_window": None, "layer_types": None}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 10}),
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


@contextmanager
def gguf_writer(path: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """A writer whose fields and tensors are on disk when the block ends."""
    writer = gguf.GGUFWriter(path, architecture)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    packing: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """Writes a model: matrices packed as `packing`, the rest float32, and what `extra` adds."""
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    with gguf_writer(path, architecture) as writer:
        _add_fields(writer, config)
        for name, array in _converted(config, tensors).items():
            kind = packing if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(
                named(name, architecture, config["num_hidden_layers"]), gguf.quantize(array, kind), raw_dtype=kind
            )
        if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
            writer.add_tensor("rope_freqs.weight", llama3_factors(config))
        extra(writer)
    return path


def named(name: str, architecture: str, layers: int) -> str:
    """The GGUF name of a Hugging Face tensor, by the gguf package's own table."""
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    found = gguf.get_tensor_name_map(number, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def llama3_factors(config: Mapping[str, Any]) -> np.ndarray:
    """The rope_freqs of Llama 3, one pair at a time and by wavelengths, as the converter reckons them."""
    scaling, size = config["rope_scaling"], head_dim(config)
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for pair in range(size // 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (2 * pair / size)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _converted(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the converter does to the values: a Llama's queries and keys permuted, 1 added to Gemma's norms."""
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads", heads["q_proj"])
    converted = {}
    for name, array in tensors.items():
        module = name.split(".")[-2]
        if config["model_type"] in ("llama", "mistral") and module in heads:
            split = array.reshape(heads[module], 2, array.shape[0] // heads[module] // 2, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
            array = array + np.float32(1.0)
        converted[name] = np.ascontiguousarray(array, np.float32)
    return converted


def _add_fields(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 1e4))
    if config["model_type"] == "mistral" or config["model_type"].startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config["model_type"] == "gemma3_text":
        writer.add_uint32("gemma3.attention.sliding_window_pattern", config["sliding_window_pattern"])
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def fields_of(changes: dict[str, Any]) -> dict[str, Any]:
    """The least that a llama's header holds, changed; None takes a field out."""
    fields = {
        "llama.block_count": 1,
        "llama.context_length": 32,
        "llama.embedding_length": 12,
        "llama.feed_forward_length": 7,
        "llama.attention.head_count": 3,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return {key: value for key, value in (fields | changes).items() if value is not None}


def write_fields(path: Path, changes: dict[str, Any], architecture: str = "llama", **shapes: tuple[int, ...]) -> Path:
    """A file of `fields_of(changes)` and tensors of ones; `token_embd__weight` stands for token_embd.weight."""
    adders = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    with gguf_writer(path, architecture) as writer:
        for key, value in fields_of(changes).items():
            getattr(writer, adders[type(value)])(key, value)
        for name, shape in ({"token_embd__weight": (11, 12)} | shapes).items():
            if shape:
                writer.add_tensor(name.replace("__", "."), np.ones(shape, np.float32))
    return path
