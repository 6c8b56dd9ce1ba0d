"""Numbers out of a configuration, checked: an error names the key, its value and the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


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
