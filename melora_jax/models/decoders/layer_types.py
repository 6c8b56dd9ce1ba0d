"""Which layers of a decoder see the whole sequence and which a window of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from melora_jax.validation import flag, number, whole

FULL, SLIDING = "full_attention", "sliding_attention"


def window_from(config: Mapping[str, Any], model_type: str, where: str) -> int | None:
    """How many tokens a sliding layer sees, the query's own included; None where no window is in use.

    Raises:
      ValueError: it is no whole number.

    >>> window_from({"sliding_window": 32, "use_sliding_window": False}, "qwen2", "config.json") is None
    True
    """
    if model_type == "llama" or (
        model_type.startswith("qwen") and not flag(config, "use_sliding_window", where, False)
    ):
        return None
    if config.get("sliding_window", 4096) is None:
        return None
    return whole(config, "sliding_window", where, 4096)


def layer_types_of(
    config: Mapping[str, Any], model_type: str, layers: int, window: int | None, where: str
) -> tuple[str, ...]:
    """The type of each layer, from `layer_types` or the keys that transformers 4 derives them from.

    Args:
      config: the content of config.json.
      model_type: the family's.
      layers: how many there are.
      window: from `window_from`.
      where: the file, for errors.

    Raises:
      ValueError: they do not fit the number of layers, the family or the window.

    >>> layer_types_of({}, "gemma2", 3, 32, "config.json")
    ('sliding_attention', 'full_attention', 'sliding_attention')
    """
    default = _default_types(config, model_type, layers, window, where)
    types = default if config.get("layer_types") is None else config["layer_types"]
    if not isinstance(types, list | tuple) or len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise ValueError(
            f"layer_types={types!r} in {where} must name {FULL} or {SLIDING} for each of the {layers} layers"
        )
    if model_type in ("llama", "mistral") and tuple(types) != default:
        raise ValueError(
            f"layer_types in {where} mix full and sliding attention, which {model_type} has not; use another model"
        )
    if SLIDING in types and window is None:
        raise ValueError(f"layer_types in {where} name {SLIDING}, but no sliding_window is in use; set both or neither")
    return tuple(types)


def _default_types(
    config: Mapping[str, Any], model_type: str, layers: int, window: int | None, where: str
) -> tuple[str, ...]:
    if model_type.startswith("gemma"):
        period = 2 if model_type == "gemma2" else whole(config, "sliding_window_pattern", where, 6)
        return tuple(FULL if (index + 1) % period == 0 else SLIDING for index in range(layers))
    if window is None:
        return (FULL,) * layers
    first = int(number(config, "max_window_layers", where, 28)) if model_type.startswith("qwen") else 0
    return tuple(SLIDING if index >= first else FULL for index in range(layers))
