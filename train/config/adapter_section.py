"""The section [adapter] of a run's configuration. Field docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

from tyro.constructors import PrimitiveConstructorSpec

Method = Literal["melora", "lora", "rslora", "lora+", "dora", "adalora", "gralora", "bitfit", "head", "full"]

_PLAIN_NAME = re.compile(r"[\w./-]+")


def _names_from_words(words: list[str]) -> tuple[str, ...] | str | None:
    """One word that can't be a plain name is a regular expression; "all-linear" and "None" are words of their own."""
    if words == ["None"]:
        return None
    if len(words) == 1 and (words[0] == "all-linear" or not _PLAIN_NAME.fullmatch(words[0])):
        return words[0]
    return tuple(words)


def _words_from_names(names: tuple[str, ...] | str | None) -> list[str]:
    if names is None:
        return ["None"]
    return [names] if isinstance(names, str) else list(names)


def _pattern_from_words(words: list[str]) -> dict[str, Any]:
    pattern: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.rpartition("=")
        if not (name and equals):
            raise ValueError(f"{word!r} is not PATH=VALUE or PATH=VALUE,VALUE")
        numbers = [float(v) if "." in v or "e" in v else int(v) for v in value.split(",")]
        pattern[name] = tuple(numbers) if len(numbers) > 1 else numbers[0]
    return pattern


def _words_from_pattern(pattern: dict[str, Any]) -> list[str]:
    return [
        f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in pattern.items()
    ]


_NAMES = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME ...]|REGEX|None",
    instance_from_str=_names_from_words,
    is_instance=lambda value: value is None or isinstance(value, str | tuple),
    str_from_instance=_words_from_names,
)

_PATTERN = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[PATH=VALUE ...]",
    instance_from_str=_pattern_from_words,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=_words_from_pattern,
)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The method and its adapters; other keys are `melora_jax.MELoRAConfig` arguments, None being the method's own."""

    method: Method = "melora"
    """What is trained: mini-adapters, one of LoRA's kinds, the biases, the head alone, or all of the model."""
    n: int | None = None
    """Mini-adapters a layer; it divides both sizes of each adapted layer. By default 8, for gralora 2; 1 is LoRA."""
    r: int | tuple[int, ...] | None = None
    """Rank of one mini-adapter, or one rank a mini. By default 1, for LoRA's kinds 8."""
    alpha: float | tuple[float, ...] | None = None
    """Numerator of the adapter's scale, or one a mini. By default 16."""
    dropout: float | None = None
    """Probability of zeroing an input feature of an adapter. By default 0."""
    scaling: Literal["mini", "total", "rslora"] | None = None
    """Scale: mini is alpha/r, total alpha/(n*r), rslora alpha/sqrt(n*r). By default mini."""
    mixer: Literal["identity", "all", "shuffle", "scatter"] | None = None
    """identity is MELoRA, all is LoRA of rank r, shuffle is GraLoRA, scatter deals features to minis at random. By
    default identity."""
    strategy: Literal["auto", "batched", "packed", "merged"] | None = None
    """How the product is computed; all give the same result. By default auto."""
    targets: Annotated[tuple[str, ...] | str | None, _NAMES] = None
    """Layers to adapt: name suffixes, one regular expression, or all-linear. By default query and value."""
    exclude: Annotated[tuple[str, ...] | str | None, _NAMES] = None
    """Layers to leave alone: name suffixes or one regular expression."""
    layers: tuple[int, ...] | None = None
    """Adapt only the layers with these numbers."""
    n_pattern: Annotated[dict[str, int], _PATTERN] = dataclasses.field(default_factory=dict)
    """Other values of n, by path suffix or regular expression."""
    rank_pattern: Annotated[dict[str, int | tuple[int, ...]], _PATTERN] = dataclasses.field(default_factory=dict)
    """Other values of r, by path suffix or regular expression."""
    alpha_pattern: Annotated[dict[str, float | tuple[float, ...]], _PATTERN] = dataclasses.field(default_factory=dict)
    """Other values of alpha, by path suffix or regular expression."""
    modules_to_save: tuple[str, ...] = ("classifier",)
    """Suffixes of modules trained whole beside the adapters, such as the head."""
    bias: Literal["none", "all", "lora_only"] | None = None
    """Biases of the base that are trained too: lora_only are those of adapted layers. By default none."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa"] | None = None
    """Start: kaiming and gaussian of A alone, orthogonal with A*B = 0, pissa at the kernel's principal part. By default
    kaiming."""


@dataclasses.dataclass(frozen=True)
class AdaLoRAConfig:
    """How method=adalora allocates ranks; adapter.r is the rank at the start. None takes the default."""

    target_r: int | None = None
    """Mean rank of a mini-adapter at the end; by default half of adapter.r, rounded up."""
    tinit: int | None = None
    """Steps at the start in which all ranks stay; by default a tenth of all."""
    tfinal: int | None = None
    """Steps at the end in which the chosen ranks stay; by default three tenths of all."""
    delta_t: int | None = None
    """Steps from one choice to the next; by default 10, or the length of the phase that chooses if that is less."""
    beta1: float | None = None
    """Decay of the smoothed sensitivity; by default 0.85."""
    beta2: float | None = None
    """Decay of its uncertainty; by default 0.85."""
    orthogonality: float | None = None
    """Weight in the loss of the factors' distance from orthogonal ones; by default 0.5."""
