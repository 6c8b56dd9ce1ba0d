"""PEFT's adapter_config.json: what of it has a counterpart here, read strictly."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from melora_jax import validation
from melora_jax.config import Bias
from melora_jax.files.safetensors_io import read_json

PEFT_CONFIG = "adapter_config.json"
PEFT_TASKS = {"sequence-classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
_TASKS = {"SEQ_CLS": "sequence-classification", "CAUSAL_LM": "causal-lm", "FEATURE_EXTRACTION": "encoder"}
# Settings that change nothing in what a trained adapter computes: where it goes, how it was started, who wrote it.
_INERT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("megatron_core", "loftq_config", "eva_config", "qalora_group_size", "mode"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "ensure_weight_tying", "use_bdlora", "bias", "use_dora"),
}
# PEFT changes the base beside these starts, so the adapter is of another base than the one it names.
_ALTERED_BASES = ("pissa", "olora", "corda", "lora_ga")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """What an adapter_config.json says.

    Attributes:
      r, alpha: rank and numerator of the scale of a LoRA.
      minis: rank and alpha of each mini in the authors' files; empty in PEFT's own.
      dropout, rslora: as in PEFT.
      rank_pattern, alpha_pattern: overrides by PEFT's own kind of pattern.
      modules_to_save: names of the modules that were trained whole.
      bias: which of the base's biases were trained, as in PEFT.
      dora: the norms of the outputs' weights are trained.
      tied: the embedding is the output layer too.
      nblocks: blocks of each A that are stored without the zeros between them; 1 for a plain A.
      base_model, task: the base's name and our word for its task, where known.
    """

    r: int = 8
    alpha: float = 8
    minis: tuple[tuple[int, float], ...] = ()
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: Bias = "none"
    dora: bool = False
    tied: bool = False
    nblocks: int = 1
    base_model: str | None = None
    task: str | None = None

    def of_site(self, path: str) -> tuple[int, float]:
        """The rank and alpha of the layer at `path`, overrides applied as PEFT does it."""
        return _override(self.rank_pattern, path, self.r), _override(self.alpha_pattern, path, self.alpha)


def _override(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    dotted = path.replace("/", ".")
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", dotted))
    return next(found, default)


def read_settings(folder: Path) -> PeftSettings:
    """Reads adapter_config.json of PEFT or of the authors' fork.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, of another method, or has a setting without a counterpart here.
    """
    where = folder / PEFT_CONFIG
    values = read_json(where)
    _require_known(values, where)
    try:
        settings = _settings(values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return settings


def _require_known(values: Mapping[str, Any], where: Path) -> None:
    if values.get("peft_type") not in ("LORA", "MELORA"):
        raise ValueError(f"{where} is of peft_type {values.get('peft_type')!r}; LORA and the authors' MELORA are read")
    if values.get("bias", "none") not in get_args(Bias):
        raise ValueError(f"{where} has bias={values['bias']!r}; PEFT knows {', '.join(get_args(Bias))}")
    if str(values.get("init_lora_weights")).lower().startswith(_ALTERED_BASES):
        start = values["init_lora_weights"]
        raise ValueError(
            f"{where} has init_lora_weights={start!r}, which changed the base; save it in PEFT with "
            "path_initial_model_for_weight_conversion first"
        )
    for key in sorted(values.keys() - _INERT - _READ):
        if values[key]:
            near = difflib.get_close_matches(key, _READ, n=1, cutoff=0.9)
            hint = f" (perhaps {near[0]!r} is meant)" if near else ""
            raise ValueError(
                f"{where} has {key}={values[key]!r}, which has no counterpart here{hint}; merge it in PEFT"
            )


def _settings(values: Mapping[str, Any]) -> PeftSettings:
    modules = values.get("modules_to_save") or []
    validation.check_names("modules_to_save", modules, regex=False)
    dropout = values.get("lora_dropout", 0.0)
    validation.check_number("lora_dropout", dropout, low=0.0, below=1.0)
    base = values.get("base_model_name_or_path")
    return PeftSettings(
        **(_minis(values) if values["peft_type"] == "MELORA" else _ranks(values)),
        dropout=dropout,
        modules_to_save=tuple(modules),
        bias=values.get("bias", "none"),
        dora=bool(values.get("use_dora")),
        tied=bool(values.get("ensure_weight_tying")),
        nblocks=_nblocks(values.get("use_bdlora")),
        base_model=base if isinstance(base, str) else None,
        task=_TASKS.get(values.get("task_type") or ""),
    )


def _minis(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors' fork says of ranks: a list for each of r and lora_alpha."""
    r, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(r, list) or not isinstance(alpha, list) or len(alpha) != len(r) or not r:
        raise ValueError(f"r={r!r} and lora_alpha={alpha!r} must be lists with one value for each mini")
    for rank, numerator in zip(r, alpha, strict=True):
        validation.check_count("r", rank)
        validation.check_alpha("lora_alpha", numerator)
    return {"minis": tuple((rank, float(numerator)) for rank, numerator in zip(r, alpha, strict=True))}


def _ranks(values: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT says of ranks: one r and lora_alpha (8 where they are left out), and overrides."""
    r, alpha = values.get("r", 8), values.get("lora_alpha", 8)
    patterns = {name: values.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        validation.check_pattern_table(name, pattern)
    for rank in (r, *patterns["rank_pattern"].values()):
        validation.check_count("r", rank)
    for numerator in (alpha, *patterns["alpha_pattern"].values()):
        validation.check_alpha("lora_alpha", numerator)
    return {"r": r, "alpha": alpha, "rslora": bool(values.get("use_rslora")), **patterns}


def _nblocks(bdlora: Any) -> int:
    if not bdlora:
        return 1
    if not isinstance(bdlora, dict) or bdlora.get("target_modules_bd_b") or not bdlora.get("match_strict", True):
        raise ValueError(f"use_bdlora={bdlora!r}: only a block-diagonal A of every layer is read; merge it in PEFT")
    validation.check_count("nblocks", bdlora.get("nblocks"))
    return bdlora["nblocks"]
