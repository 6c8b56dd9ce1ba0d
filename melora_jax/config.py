"""What to adapt and how: `MELoRAConfig`, and `AdapterSpec`, its resolution at one site."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from melora_jax import validation

Scaling = Literal["mini", "total", "rslora"]
Mixer = Literal["identity", "all", "shuffle", "scatter"]
Strategy = Literal["auto", "batched", "packed", "merged"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa"]
Variant = Literal["plain", "dora", "adalora"]
Bias = Literal["none", "all", "lora_only"]

ALL_LINEAR = "all-linear"
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "scaling": get_args(Scaling),
    "mixer": get_args(Mixer),
    "strategy": get_args(Strategy),
    "init": get_args(Init),
    "variant": get_args(Variant),
    "dtype": (None, "float32", "bfloat16", "float16", "float64"),
}
_NAMES = ("targets", "exclude", "modules_to_save")
_PATTERNS = ("n_pattern", "rank_pattern", "alpha_pattern")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The adapter of one layer, every value resolved: `n` minis with one rank and one alpha each.

    Attributes:
      n: number of mini-adapters.
      r: rank of each mini, `n` ints.
      alpha: numerator of each mini's scale, `n` floats.
      dropout, scaling, mixer, strategy, init, dtype, variant: as in `MELoRAConfig`.

    Raises:
      ValueError: an unknown choice, a value out of range, or values that contradict each other.

    >>> AdapterSpec(n=2, r=(1, 3), alpha=(16.0, 6.0)).scales
    (16.0, 2.0)
    """

    n: int
    r: tuple[int, ...]
    alpha: tuple[float, ...]
    dropout: float = 0.0
    scaling: Scaling = "mini"
    mixer: Mixer = "identity"
    strategy: Strategy = "auto"
    init: Init = "kaiming"
    dtype: str | None = None
    variant: Variant = "plain"

    def __post_init__(self) -> None:
        validation.check_choices(self, _CHOICES)
        validation.check_number("dropout", self.dropout, low=0.0, below=1.0)
        validation.check_count("n", self.n)
        for name, check in (("r", validation.check_count), ("alpha", validation.check_alpha)):
            values = getattr(self, name)
            for value in values:
                check(name, value)
            if len(values) != self.n:
                given = f"{name}={list(values)} has {len(values)} values for n={self.n} minis"
                raise ValueError(f"{given}; give one value, or {self.n}")
        if self.strategy == "merged" and self.dropout > 0:
            raise ValueError(
                f"strategy='merged' has no input of the adapter's own to drop from: use dropout=0, not {self.dropout}"
            )
        if self.mixer != "identity" and len(set(self.r)) > 1:
            raise ValueError(
                f'mixer="{self.mixer}" needs one r for all minis, not {list(self.r)}; use mixer="identity"'
            )
        if self.mixer == "shuffle" and self.r[0] % self.n:
            sizes = f"n={self.n}, r={self.r[0]}"
            raise ValueError(f'mixer="shuffle" needs n to divide r: {sizes}; choose r from multiples of {self.n}')
        validation.check_start(self)

    @property
    def latents(self) -> int:
        """Σ r_k, the width of the latent space: the total rank for `identity` and `shuffle`."""
        return sum(self.r)

    @property
    def rank(self) -> int:
        """The rank of ΔW for generic factors wide enough: Σ r_k, r for mixer `all`, twice that for init `pissa`.

        For variant `dora` that of what is added before the normalisation.
        """
        return (self.r[0] if self.mixer == "all" else self.latents) * (2 if self.init == "pissa" else 1)

    @property
    def scales(self) -> tuple[float, ...]:
        """s_k, the factor of each mini's product."""
        divisor = {"mini": None, "total": float(self.latents), "rslora": math.sqrt(self.latents)}[self.scaling]
        return tuple(alpha / (divisor or r) for alpha, r in zip(self.alpha, self.r, strict=True))

    def parameters(self, d_in: int, d_out: int) -> int:
        """Σ r_k·(d_in/n + d_out/n), the trainable parameters of a site; `dora` has d_out more, `adalora` Σ r_k."""
        more = {"plain": 0, "dora": d_out, "adalora": self.latents}[self.variant]
        return self.latents * (d_in // self.n + d_out // self.n) + more


@dataclasses.dataclass(frozen=True, kw_only=True)
class MELoRAConfig:
    """Which layers get mini-adapters, and of what shape. Reads like PEFT's `LoraConfig`.

    Attributes:
      n: mini-adapters a layer; it must divide both sizes of each. `n=1` is LoRA.
      r: rank of one mini, or one rank a mini. ΔW has rank Σ r_k, at r·(d_in + d_out) parameters.
      alpha: numerator of the scale, or one a mini (PEFT: `lora_alpha`).
      dropout: probability of zeroing an input feature of an adapter (PEFT: `lora_dropout`).
      scaling: `"mini"` alpha_k/r_k (the authors' code), `"total"` alpha/(n·r), `"rslora"` alpha/sqrt(n·r).
      mixer: `"identity"` MELoRA, `"all"` LoRA of rank r, `"shuffle"` GraLoRA, `"scatter"` MELoRA whose minis get the
        features in a fixed random order: the control for whether it matters which features a mini reads and writes.
      strategy: how the product is computed: `"batched"`, `"packed"`, `"merged"` (W + ΔW is formed in each step: for
        dense layers of NNX models, without dropout), or `"auto"`. All give the same result. `"batched"` alone has a
        derivative in forward mode (`jax.jvp`) wherever it runs.
      targets: name suffixes (`["query", "value"]`), one regular expression matched against the whole path, or
        `"all-linear"` but for a language model's output layer (PEFT: `target_modules`). Empty puts no adapter in.
      exclude: suffixes or one regular expression of layers to leave alone (PEFT: `exclude_modules`).
      layers: keep only sites whose first number in the path is in this list (PEFT: `layers_to_transform`).
      n_pattern, rank_pattern, alpha_pattern: overrides, path suffix or regular expression → value; the first
        match counts, and suffixes may be written with "." or "/".
      modules_to_save: suffixes of modules that are trained whole, such as a new head.
      bias: biases of the base that are trained: `"none"`, `"all"`, or `"lora_only"`, those of adapted layers (as in
        PEFT). `"all"` without targets is BitFit (arXiv 2106.10199).
      train_base: train every parameter of the base, full fine-tuning; targets must be empty.
      init: start of A: `"kaiming"` uniform within 1/sqrt(d_in/n), `"gaussian"` with deviation 1/r. B is zero.
        `"orthogonal"` starts both, with A·B = 0, and `"pissa"` at the principal part of the kernel's diagonal blocks
        (arXiv 2404.02948), of which the adapter learns the difference: the base is not changed. See `starts`.
      variant: `"plain"`, `"dora"` with a learnt norm of each output's weights (arXiv 2402.09353; PEFT: `use_dora`), or
        `"adalora"` with a factor for each latent, of which a `RankBudget` keeps the important (arXiv 2303.10512).
      dtype: dtype the adapter's product is computed in; `None` follows the layer. Factors are kept in float32.

    Raises:
      ValueError: an unknown choice, or a value out of range.

    >>> MELoRAConfig(n=4, r=2, targets=["query"]).spec("encoder/layer/0/query").rank
    8
    """

    n: int = 8
    r: int | Sequence[int] = 1
    alpha: float | Sequence[float] = 16.0
    dropout: float = 0.0
    scaling: Scaling = "mini"
    mixer: Mixer = "identity"
    strategy: Strategy = "auto"
    targets: Sequence[str] | str = ()
    exclude: Sequence[str] | str = ()
    layers: Sequence[int] | None = None
    n_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rank_pattern: Mapping[str, int | Sequence[int]] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float | Sequence[float]] = dataclasses.field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    bias: Bias = "none"
    train_base: bool = False
    init: Init = "kaiming"
    dtype: str | None = None
    variant: Variant = "plain"

    def __post_init__(self) -> None:
        for name in _NAMES:
            validation.check_names(name, getattr(self, name), regex=name != "modules_to_save")
        validation.check_layers(self.layers)
        for name in _PATTERNS:
            validation.check_pattern_table(name, getattr(self, name))
        self._normalise()
        for name, check, values in (
            ("n", validation.check_count, [self.n, *self.n_pattern.values()]),
            ("r", validation.check_count, [self.r, *self.rank_pattern.values()]),
            ("alpha", validation.check_alpha, [self.alpha, *self.alpha_pattern.values()]),
        ):
            for value in values:
                for entry in value if isinstance(value, tuple) and name != "n" else (value,):
                    check(name, entry)
        validation.check_choices(self, {"bias": get_args(Bias)})
        validation.check_trained(self)
        self.spec("")  # checks the rest

    def _normalise(self) -> None:
        """Lists become tuples and whole alphas floats, so that equal configs compare and hash equal."""
        for name in (*_NAMES, "layers", "r"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        object.__setattr__(self, "alpha", _as_floats(self.alpha))
        for name, convert in zip(_PATTERNS, (_as_tuple, _as_tuple, _as_floats), strict=True):
            object.__setattr__(self, name, {key: convert(value) for key, value in getattr(self, name).items()})

    def __eq__(self, other: object) -> bool:
        # Patterns are tried in order, so their order counts, which it does not between dicts.
        return isinstance(other, MELoRAConfig) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def spec(self, path: str) -> AdapterSpec:
        """The adapter of the layer at `path`, overrides applied.

        Raises:
          ValueError: overrides that do not fit together, naming the path.
        """
        n = first_match(self.n_pattern, path, self.n)
        r = first_match(self.rank_pattern, path, self.r)
        alpha = first_match(self.alpha_pattern, path, self.alpha)
        try:
            return AdapterSpec(
                n=n,
                r=r if isinstance(r, tuple) else (r,) * n,
                alpha=alpha if isinstance(alpha, tuple) else (alpha,) * n,
                dropout=self.dropout,
                scaling=self.scaling,
                mixer=self.mixer,
                strategy=self.strategy,
                init=self.init,
                dtype=self.dtype,
                variant=self.variant,
            )
        except ValueError as error:
            raise ValueError(f"{error} (at {path})" if path else str(error)) from None

    def to_json(self) -> str:
        """The config as one JSON object, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MELoRAConfig:
        """The inverse of `to_json`.

        Raises:
          ValueError: not JSON, not an object, or an unknown key (named, with the nearest known one).
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the adapter config is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"the adapter config must be a JSON object, not {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"perhaps {near[0]!r}" if near else f"known are {', '.join(known)}"
                raise ValueError(f"unknown key {key!r} in the adapter config; {hint}")
        return cls(**values)


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` names the module at `path`: equal, a suffix of whole names, or a regular expression.

    >>> matches("self.query", "layer/0/self/query"), matches(r".*/[02]/.*", "layer/0/self/query")
    (True, True)
    >>> matches("ery", "query")
    False
    """
    return is_suffix(pattern, path) or any(
        re.fullmatch(pattern, spelled) is not None for spelled in (path, path.replace("/", "."))
    )


def is_suffix(name: str, path: str) -> bool:
    """Whether `name`, written with "." or "/", is `path` or its last whole names."""
    return ("/" + path).endswith("/" + name.replace(".", "/"))


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches `path`, else `default`."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _as_floats(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_as_floats, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
