"""What serves an adapter in PEFT's format: the rules of those that read it, and why one would refuse.

Sources: vLLM 0.32 `vllm/lora/peft_helper.py`, `lora_model.py`, `utils.py`, `config/lora.py`; SGLang 0.5.23
`srt/lora/lora_config.py`, `lora.py`; llama.cpp `convert_lora_to_gguf.py`; PEFT 0.21 `tuners/lora/config.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from melora_jax.core.report import SERVED_RANKS, served_rank

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING_FACTORS = (".lora_embedding_A", ".lora_embedding_B")


@dataclasses.dataclass(frozen=True)
class Reader:
    """One program that reads PEFT's format: how it serves an adapter, or why it does not.

    Attributes:
      name: the program.
      serves: whether it gives the adapter's own function.
      note: what it must be told, or the reason.
    """

    name: str
    serves: bool
    note: str

    def __str__(self) -> str:
        return f"{self.name}: {'' if self.serves else 'no, '}{self.note}"


def readers(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Reader, ...]:
    """How PEFT, vLLM, SGLang and llama.cpp's converter take an adapter.

    Args:
      config: the content of adapter_config.json.
      shapes: the shape of each tensor of adapter_model.safetensors by its name.

    >>> plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    >>> [str(reader) for reader in readers(plain, {"base_model.model.q.lora_A.weight": (4, 6)})][1]
    'vLLM: with --max-lora-rank 8'
    """
    if config.get("peft_type") != "LORA":
        reason = f"it reads peft_type LORA, not {config.get('peft_type')!r}; import it and export it again"
        return tuple(Reader(name, False, reason) for name in ("PEFT", "vLLM", "SGLang", "llama.cpp"))
    rank = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    served = served_rank(rank)
    answers = {
        "vLLM": (_vllm(config, shapes, rank), f"with --max-lora-rank {served}"),
        "SGLang": (_sglang(config, shapes), f"with --max-lora-rank {rank}"),
        "llama.cpp": (_llama_cpp(config, shapes), "after convert_lora_to_gguf.py"),
    }
    found = [Reader(name, reason is None, reason or note) for name, (reason, note) in answers.items()]
    return (Reader("PEFT", True, "as it is"), *found)


def _extras(shapes: Mapping[str, tuple[int, ...]], *allowed: str) -> list[str]:
    """The names, without PEFT's prefix, of tensors that are neither factors of dense layers nor end as allowed."""
    names = sorted(name for name in shapes if not name.endswith((*_FACTORS, *allowed)))
    return [name.removeprefix("base_model.model.") for name in names]


def _vllm(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rank: int) -> str | None:
    for key in ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"):
        if config.get(key):
            return f"it refuses {key}"
    if config.get("bias", "none") != "none":
        return f"it refuses bias={config['bias']!r}"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        return f"it refuses init_lora_weights={start!r}"
    if served_rank(rank) is None:
        return f"rank {rank} is above its limit of {SERVED_RANKS[-1]}"
    heads = ("classifier.weight", "classifier.bias", "score.weight", "score.bias")
    extra = _extras(shapes, *_EMBEDDING_FACTORS, *heads)
    return f"of whole modules it reads a flat classifier or score alone, not {extra[0]}" if extra else None


def _sglang(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if config.get("use_dora"):
        return "it refuses use_dora"
    for key in ("use_rslora", "rank_pattern", "alpha_pattern", "use_bdlora"):
        if config.get(key):
            return f"it ignores {key}, so its scale would be wrong"
    if isinstance(config.get("target_modules"), str) and config["target_modules"] not in ("all", "all-linear"):
        return "it takes a list of target_modules, not a regular expression"
    extra = _extras(shapes, *(f".embed_tokens{factor}" for factor in _EMBEDDING_FACTORS))
    return f"it ignores {extra[0]}, which was trained" if extra else None


def _llama_cpp(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        return "it runs language models alone"
    for key in ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "use_bdlora"):
        if config.get(key):
            return f"its converter ignores {key}, so its scale would be wrong"
    extra = [name for name in _extras(shapes, *_EMBEDDING_FACTORS) if "_layernorm" not in name and ".norm" not in name]
    return f"its converter refuses {extra[0]}, which is not a LoRA factor" if extra else None
