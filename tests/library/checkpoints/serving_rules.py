"""What each program that reads PEFT's format checks and does, restated from its source as a validator; nothing of ours.

vLLM 0.32: `vllm/lora/peft_helper.py` (`PEFTHelper`: required keys, refused features, `validate_legal`), `lora_model.py`
(`check_unexpected_modules`, the names of modules_to_save), `utils.py` (`parse_fine_tuned_lora_name`), `config/lora.py`.
SGLang 0.5.23: `srt/lora/lora_config.py` (the keys it reads), `lora.py` (peft_type, scale), `lora_manager.py`.
llama.cpp: `convert_lora_to_gguf.py` (`get_base_tensor_name`, `get_tensors`, `lora_alpha`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
HEADS = ("classifier", "score")
PREFIX = "base_model.model."
Tensors = Mapping[str, np.ndarray]


def vllm(config: Mapping[str, Any], tensors: Tensors, max_lora_rank: int, modules: set[str]) -> list[str]:
    """Why vLLM would refuse the adapter on a model with these leaf modules; empty if it would not."""
    wrong = [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    refused = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
    wrong += [f"{key} is set" for key in refused if config.get(key)]
    if config.get("bias", "none") != "none":
        wrong.append("bias is set")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"):
        wrong.append("the base was altered")
    wrong += [f"{name} is saved whole" for name in config.get("modules_to_save") or [] if name not in HEADS]
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    wrong += [f"rank {rank} is above {max_lora_rank}" for rank in ranks if rank > max_lora_rank]
    if max_lora_rank not in VLLM_RANKS:
        wrong.append(f"--max-lora-rank takes no {max_lora_rank}")
    listed = config["target_modules"]
    for name in [] if isinstance(listed, str) else listed:
        if name.split(".")[-1] not in modules:
            wrong.append(f"the model has no {name}")
    for name in tensors:
        parts = name.split(".")
        factor = parts[-2:] in (["lora_A", "weight"], ["lora_B", "weight"])
        head = parts[-1] in ("weight", "bias") and parts[-2] in HEADS
        if not factor and not head and parts[-1] not in ("lora_embedding_A", "lora_embedding_B"):
            wrong.append(f"{name} is no factor")
    return wrong


def sglang(config: Mapping[str, Any], tensors: Tensors, max_lora_rank: int) -> list[str]:
    """Why SGLang would refuse the adapter or serve another function; empty if it would do neither."""
    wrong = [] if config["peft_type"].lower() == "lora" else ["peft_type is not lora"]
    ignored = ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    wrong += [f"{key} would be ignored" for key in ignored if config.get(key)]
    if config.get("use_dora", False):
        wrong.append("DoRA is refused")
    if not isinstance(config["target_modules"], list):
        wrong.append("target_modules is no list")
    if config["r"] > max_lora_rank:
        wrong.append("r is above --max-lora-rank")
    for name, value in tensors.items():
        axis = 0 if ".lora_A." in name else 1
        if "lora_" in name and value.shape[axis] != config["r"]:
            wrong.append(f"{name} has another rank than r")
    return wrong


def llama_cpp(config: Mapping[str, Any], tensors: Tensors, gguf_names: Any) -> list[str]:
    """Why its converter would stop or write another function; `gguf_names` is the architecture's name map."""
    wrong = [f"{key} would be ignored" for key in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    for name, value in tensors.items():
        if not any(factor in name for factor in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_")):
            if "_layernorm" not in name and ".norm" not in name:
                wrong.append(f"Unexpected name {name!r}")
            continue
        base = name.replace(PREFIX, "").replace(".lora_A.weight", ".weight").replace(".lora_B.weight", ".weight")
        base = base.replace(".lora_embedding_A", ".weight").replace(".lora_embedding_B", ".weight")
        if gguf_names.get_name(base, try_suffixes=(".weight", ".bias")) is None:
            wrong.append(f"{base} has no GGUF name")
        # it scales by lora_alpha over the tensor's own rank
        rank = value.shape[0] if ("lora_A" in name or "embedding_A" in name) else value.shape[1]
        if rank != config["r"]:
            wrong.append(f"{name} would be scaled by lora_alpha / {rank}")
    return wrong
