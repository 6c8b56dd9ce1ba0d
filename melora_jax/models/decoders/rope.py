"""Rotary position embeddings: each pair of a head's features turns by an angle that grows with the position.

A checkpoint's configuration names one of five kinds, which differ in how fast each pair turns when a model is used at
lengths beyond those it was first trained on: default, linear, dynamic, llama3 and yarn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from melora_jax.core.platform import platform
from melora_jax.validation import number, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How a rotary embedding turns.

    Attributes:
      size: features of a head.
      theta: base of the wavelengths, `rope_theta`.
      kind: "default", "linear", "dynamic", "llama3" or "yarn".
      limit: `max_position_embeddings`.
      original_limit: the length the model was first trained at (llama3, yarn).
      factor: by how much the context was stretched.
      low, high: the numbers of turns in the original length between which frequencies are blended: llama3's
        `low_freq_factor` and `high_freq_factor`, yarn's `beta_slow` and `beta_fast`.
      truncate: yarn rounds the blended range to whole pairs.
      magnitude: cosine and sine are multiplied by it (yarn).
    """

    size: int
    theta: float
    kind: str = "default"
    limit: int
    original_limit: int
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0


def rope_from(parameters: Mapping[str, Any], *, size: int, theta: float, limit: int, where: str) -> Rope:
    """The rotary embedding that a configuration describes.

    Args:
      parameters: `rope_scaling` (transformers 4) or `rope_parameters` (5); empty for the default.
      size: features of a head.
      theta: the base if `parameters` has none.
      limit: the longest sequence, `max_position_embeddings`.
      where: the file, for errors.

    Raises:
      ValueError: the kind is unknown, or a value is missing or impossible.

    >>> rope_from({"type": "linear", "factor": 4.0}, size=6, theta=1e4, limit=32, where="config.json").factor
    4.0
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _FREQUENCIES:
        raise ValueError(f"RoPE of type {kind!r} in {where} is not supported; choose from {', '.join(_FREQUENCIES)}")
    if size % 2:
        raise ValueError(f"head_dim={size} in {where} is odd, but RoPE turns pairs of features; correct it")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        found = parameters["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor={found!r} in {where} is not supported, only 1; use another model")
    original = positive(parameters, "original_max_position_embeddings", where, limit)
    settings: dict[str, Any] = {
        "size": size,
        "theta": positive(parameters, "rope_theta", where, theta),
        "kind": kind,
        "limit": limit,
        "original_limit": original,
    }
    if kind in ("linear", "dynamic", "llama3"):
        settings["factor"] = positive(parameters, "factor", where)
    if kind == "llama3":
        settings |= {end: positive(parameters, f"{end}_freq_factor", where) for end in ("low", "high")}
    if kind == "yarn":
        settings |= _yarn_settings(parameters, limit / original, where)
    rope = Rope(**settings)
    if kind == "llama3" and rope.high <= rope.low:
        raise ValueError(
            f"high_freq_factor={rope.high} in {where} is not above low_freq_factor={rope.low}; correct them"
        )
    return rope


def _yarn_settings(parameters: Mapping[str, Any], stretch: float, where: str) -> dict[str, Any]:
    factor = positive(parameters, "factor", where, stretch)
    magnitude, whole = (number(parameters, key, where, 0.0) for key in ("mscale", "mscale_all_dim"))
    if magnitude and whole:
        default = _yarn_magnitude(factor, magnitude) / _yarn_magnitude(factor, whole)
    else:
        default = _yarn_magnitude(factor, 1.0)
    return {
        "factor": factor,
        "low": positive(parameters, "beta_slow", where, 1.0),
        "high": positive(parameters, "beta_fast", where, 32.0),
        "truncate": parameters.get("truncate") is not False,
        "magnitude": positive(parameters, "attention_factor", where, default),
    }


def _yarn_magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _default(rope: Rope) -> np.ndarray:
    return rope.theta ** -(np.arange(0, rope.size, 2) / rope.size)


def _linear(rope: Rope) -> np.ndarray:
    return _default(rope) / rope.factor


def _llama3(rope: Rope) -> np.ndarray:
    """Pairs that turn often in the original length keep their speed, slow ones turn slower, others lie between."""
    fast = _default(rope)
    turns = rope.original_limit * fast / (2 * math.pi)
    kept = np.clip((turns - rope.low) / (rope.high - rope.low), 0.0, 1.0)
    return fast * (kept + (1.0 - kept) / rope.factor)


def _yarn(rope: Rope) -> np.ndarray:
    """As llama3, but blended linearly in the pair's number. Source: YaRN (Peng et al. 2023), section 3.2."""
    fast = _default(rope)
    first, last = (_pair_of_turns(rope, turns) for turns in (rope.high, rope.low))
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.size - 1)
    width = last - first if last != first else 0.001
    slowed = np.clip((np.arange(rope.size // 2) - first) / width, 0.0, 1.0)
    return fast * ((1.0 - slowed) + slowed / rope.factor)


def _pair_of_turns(rope: Rope, turns: float) -> float:
    """The number (in general a fraction) of the pair that turns `turns` times in the original length."""
    return rope.size * math.log(rope.original_limit / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


_FREQUENCIES: dict[str, Callable[[Rope], np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "llama3": _llama3,
    "yarn": _yarn,
}


def rotations(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each pair's angle, `angle = position · frequency`.

    A dynamic embedding turns more slowly, for all positions alike, once the last position passes the limit.

    Args:
      rope: how it turns.
      positions: int `[b, t]`.

    Returns:
      Two float32 arrays `[b, t, size / 2]`.

    >>> cos, sin = rotations(Rope(size=2, theta=1e4, limit=8, original_limit=8), jnp.array([[0, 1]]))
    >>> cos.shape, round(float(sin[0, 1, 0]), 4)
    ((1, 2, 1), 0.8415)
    """
    frequencies = jnp.asarray(_FREQUENCIES[rope.kind](rope), jnp.float32)
    if rope.kind == "dynamic":
        length = jnp.maximum(positions.max() + 1, rope.limit).astype(jnp.float32)
        # θ' = θ · (factor · length / limit - factor + 1)^(size / (size - 2)), to the power of each pair
        stretch = rope.factor * length / rope.limit - (rope.factor - 1.0)
        frequencies = frequencies * stretch ** -(jnp.arange(0, rope.size, 2) / max(rope.size - 2, 1))

    def turned(frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude

    if platform() != "cpu" or frequencies.size % 2:
        return turned(frequencies)
    # XLA on CPU fuses cosines into their users, which recompute them for each head of each layer; it fuses nothing out
    # of a loop.
    cos, sin = jax.lax.map(turned, frequencies.reshape(2, -1))
    return jnp.concatenate([*cos], axis=-1), jnp.concatenate([*sin], axis=-1)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns feature j of each head with feature j + size/2, in float32.

    Args:
      x: `[b, t, h, size]`.
      cos, sin: `[b, t, size / 2]`, from `rotations`.

    Returns:
      The shape and dtype of `x`.

    Source: RoFormer (Su et al. 2021), equation 34, with the pairs as Hugging Face stores them.

    >>> rotate(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[0.0]]]), jnp.array([[[1.0]]])).tolist()
    [[[[0.0, 1.0]]]]
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
