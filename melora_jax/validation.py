"""Checks of single values: of settings (`check_...`), and of what a configuration file says.

Each raises ValueError with the name, the value, what it should be, and the file.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What PEFT's LoraConfig calls a setting, and what it is here.
_PEFT_SETTINGS = {
    "target_modules": 'called targets here: MELoRAConfig(targets=["query", "value"])',
    "exclude_modules": 'called exclude here: MELoRAConfig(exclude=["lm_head"])',
    "lora_r": "called r here, the rank of one mini: MELoRAConfig(n=1, r=8) is LoRA of rank 8",
    "lora_alpha": "called alpha here: MELoRAConfig(alpha=16)",
    "lora_dropout": "called dropout here: MELoRAConfig(dropout=0.05)",
    "layers_to_transform": "called layers here: MELoRAConfig(layers=[0, 1])",
    "layers_pattern": "not needed: layers=[0, 1] counts by the first number in a path",
    "use_rslora": 'called scaling here: MELoRAConfig(scaling="rslora")',
    "use_dora": 'called variant here: MELoRAConfig(variant="dora")',
    "init_lora_weights": 'called init here: MELoRAConfig(init="kaiming"), or "gaussian", "orthogonal", "pissa"',
    "lora_bias": 'not there: the factors have no biases; bias="lora_only" trains those of the adapted layers',
    "task_type": 'not a setting of the adapter: the model has it, from_pretrained(..., task="causal-lm")',
    "peft_type": "not a setting: every adapter here is a LoRA or MELoRA",
    "base_model_name_or_path": "not a setting: the model knows where it comes from",
    "inference_mode": "not a setting: adapters drop nothing outside of dropout_key",
    "fan_in_fan_out": "not needed: a kernel's layout is read off its layer",
}


def unknown_setting(name: str, known: Sequence[str], where: str) -> str:
    """The error for an unknown setting of `where`: our word for PEFT's, or the nearest known one.

    >>> unknown_setting("lora_alpha", ["alpha"], "MELoRAConfig")
    'lora_alpha is called alpha here: MELoRAConfig(alpha=16)'
    >>> unknown_setting("targts", ["alpha", "targets"], "MELoRAConfig")
    "unknown key 'targts' in MELoRAConfig; perhaps 'targets'"
    """
    if name in _PEFT_SETTINGS:
        return f"{name} is {_PEFT_SETTINGS[name]}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown key {name!r} in {where}; " + (f"perhaps {near[0]!r}" if near else f"known are {', '.join(known)}")


def check_choices(settings: Any, known: Mapping[str, Sequence[str | None]]) -> None:
    """Each attribute named in `known` is one of the values there."""
    for name, choices in known.items():
        value = getattr(settings, name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [choice for choice in choices if choice], n=1)
            raise ValueError(f"{name}={value!r} is unknown; choose {' or '.join(map(repr, near or choices))}")


def check_count(name: str, value: Any, low: int = 1) -> None:
    """A whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        many = ", or a list with one for each mini" if name == "r" else ""
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}{many}")


def check_alpha(name: str, value: Any) -> None:
    """A positive, finite number."""
    check_number(name, value, low=math.ulp(0.0), below=math.inf)


def check_trained(config: Any) -> None:
    """What is trained beside the adapters fits together, and is not nothing."""
    if type(config.train_base) is not bool:
        raise ValueError(f"train_base={config.train_base!r} must be True or False")
    if config.train_base and (config.targets or config.bias != "none"):
        beside = f"targets={config.targets!r}" if config.targets else f"bias={config.bias!r}"
        raise ValueError(f"train_base trains all of the base, so {beside} adds nothing; leave one of them out")
    if config.bias == "lora_only" and not config.targets:
        raise ValueError('bias="lora_only" trains the biases of adapted layers, and targets is empty; take "all"')
    if not config.targets and not config.modules_to_save and config.bias == "none" and not config.train_base:
        raise ValueError(
            'nothing to train: targets and modules_to_save are both empty; name layers, e.g. targets=["query", "value"]'
        )


def check_kind(spec: Any) -> None:
    """The start values and the variant of an adapter fit each other, its ranks, its mixer and its dropout."""
    from_blocks, variant = spec.init in ("orthogonal", "pissa"), spec.variant
    if (from_blocks or variant == "adalora") and spec.mixer != "identity":
        what = f"init={spec.init!r}" if from_blocks else f"variant={variant!r}"
        raise ValueError(f'{what} is defined for mixer="identity" only, not {spec.mixer!r}; leave one of them out')
    if from_blocks and variant != "plain":
        raise ValueError(f'init={spec.init!r} is for variant="plain", not {variant!r}; take init="kaiming"')
    if variant == "adalora" and (spec.init != "kaiming" or len(set(spec.r)) > 1):
        given = f"init={spec.init!r}" if spec.init != "kaiming" else f"r={list(spec.r)}"
        raise ValueError(f"variant='adalora' has its own start, and one r for all minis: leave {given} out")
    if spec.init == "orthogonal" and (len(set(spec.r)) > 1 or spec.r[0] % 2):
        raise ValueError(f"init='orthogonal' needs one even r for all minis, not {list(spec.r)}; choose 2, 4, 6 ...")
    if spec.init == "pissa" and spec.dropout:
        raise ValueError(
            f"init='pissa' starts at the kernel's principal part, which dropout={spec.dropout} would drop; set it to 0"
        )


def check_number(name: str, value: Any, low: float, below: float) -> None:
    """A finite number in [low, below)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < below:
        span = "above 0" if below == math.inf else f"at least {low:g} and below {below:g}"
        raise ValueError(f"{name}={value!r} must be a number {span}")


def check_names(name: str, value: Any, regex: bool) -> None:
    """A list of names or, where `regex` allows it, one regular expression."""
    if isinstance(value, str) and regex:
        _check_regex(name, value)
    elif isinstance(value, str):
        raise ValueError(f"{name}={value!r} is one string; give a list: [{value!r}]")
    elif not isinstance(value, Sequence) or not all(isinstance(entry, str) and entry for entry in value):
        raise ValueError(f"{name}={value!r} must be a list of module names" + (", or one string" if regex else ""))


def check_layers(value: Any) -> None:
    """None, or a list of whole numbers."""
    if value is not None and (
        not isinstance(value, Sequence) or not value or not all(type(entry) is int and entry >= 0 for entry in value)
    ):
        raise ValueError(f"layers={value!r} must be a list of layer numbers, such as [0, 1], or None for all")


def check_pattern_table(name: str, value: Any) -> None:
    """A mapping with path patterns as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ValueError(f'{name}={value!r} must map path suffixes to values, such as {{"attention.self.query": 4}}')
    for pattern in value:
        _check_regex(name, pattern)


def check_sizes(d_in: int, d_out: int, n: int, path: str) -> None:
    """Raises ValueError unless n divides both sizes; the message lists the n that do."""
    for name, size in (("d_in", d_in), ("d_out", d_out)):
        if size % n:
            fits = ", ".join(str(k) for k in range(1, min(d_in, d_out, 128) + 1) if d_in % k == 0 == d_out % k)
            raise ValueError(f"n={n} does not divide {name}={size} at {path}; choose n from {fits}")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name}: {pattern!r} is not a regular expression ({error}); escape it, or list names instead"
        ) from None


def number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A finite number; a key that is absent or null gives the default.

    Raises:
      ValueError: it is something else, or absent without a default.

    >>> number({"factor": 8}, "factor", "config.json"), number({}, "factor", "config.json", 1.5)
    (8.0, 1.5)
    """
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"{where} lacks {key}, the model cannot be built without it; fetch the file again")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key}={value!r} in {where} must be a number")
    return float(value)


def positive(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A number above 0. Raises ValueError as `number` does.

    >>> positive({"rope_theta": 1e6}, "rope_theta", "config.json")
    1000000.0
    """
    value = number(config, key, where, default)
    if value <= 0:
        raise ValueError(f"{key}={config[key]!r} in {where} must be a positive number")
    return value


def whole(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number of at least 1. Raises ValueError as `number` does.

    >>> whole({"hidden_size": 64}, "hidden_size", "config.json")
    64
    """
    value = number(config, key, where, default)
    if value < 1 or not value.is_integer():
        raise ValueError(f"{key}={config[key]!r} in {where} must be a whole number of at least 1")
    return int(value)


def flag(config: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """True or false; a key that is absent or null gives the default.

    Raises:
      ValueError: it is something else.

    >>> flag({}, "attention_bias", "config.json", False)
    False
    """
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} in {where} must be true or false")
    return value
