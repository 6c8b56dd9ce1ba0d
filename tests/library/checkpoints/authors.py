"""Files as the MELoRA authors' fork of PEFT writes them, and its forward pass, in NumPy; nothing of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The keys that MELoraConfig of their peft 0.5.0 writes, with its defaults.
SETTINGS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "their/base",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_dropout": 0.05,
    "mode": "sum",
    "modules_to_save": ["classifier"],
    "peft_type": "MELORA",
    "revision": None,
    "target_modules": ["query", "value"],
    "task_type": "SEQ_CLS",
}


def minis(seed: int, d_in: int, d_out: int, r: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """lora_A [r_k, d_in // n] and lora_B [d_out // n, r_k] of each mini."""
    rng, n = np.random.default_rng(seed), len(r)
    drawn = [(rng.normal(size=(rank, d_in // n)), rng.normal(size=(d_out // n, rank))) for rank in r]
    return [(a.astype(np.float32), b.astype(np.float32)) for a, b in drawn]


def tensors(sites: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Their state dict: the number of the mini where PEFT has the adapter's name, before it is saved."""
    return {
        f"base_model.model.{module}.lora_{side}.{k}.weight": pair["AB".index(side)]
        for module, pairs in sites.items()
        for k, pair in enumerate(pairs)
        for side in "AB"
    }


def write_config(folder: Path, r: Sequence[int], alpha: Sequence[float], **changes: Any) -> None:
    """Their adapter_config.json."""
    folder.mkdir(exist_ok=True)
    values = SETTINGS | {"r": list(r), "lora_alpha": list(alpha)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(values))


def forward(x: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]], alpha: Sequence[float]) -> np.ndarray:
    """concat_k( alpha_k / r_k · B_k A_k x_k ), as their Linear adds it to its result, in float64."""
    g = x.shape[-1] // len(pairs)
    parts = [
        (numerator / len(a)) * (x[..., k * g : (k + 1) * g].astype(np.float64) @ a.T @ b.T)
        for k, ((a, b), numerator) in enumerate(zip(pairs, alpha, strict=True))
    ]
    return np.concatenate(parts, axis=-1)
