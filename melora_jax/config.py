"""What to adapt and how: `MELoRAConfig`; `AdapterSpec`, the settings of one layer's adapter; and patterns of paths."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args

from melora_jax import validation

Scaling = Literal["mini", "total", "rslora"]
Mixer = Literal["identity", "all", "shuffle", "scatter"]
Strategy = Literal["auto", "batched", "packed", "merged"]
Init = Literal["kaiming", "gaussian", "orthogonal", "pissa"]
Variant = Literal["plain", "dora", "adalora"]
Kind = Literal["plain", "dora", "adalora", "pissa"]
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
    """The settings of one layer's adapter: `n` minis with one rank and one alpha each.

    Attributes:
      n: number of mini-adapters.
      r: rank of each mini, `n` ints.
      alpha: numerator of each mini's scale, `n` floats.
      dropout, scaling, mixer, strategy, init, dtype, variant: as in `MELoRAConfig`.

    Raises:
      ValueError: an unknown choice, a value out of range, or values that do not fit together.

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
        validation.check_kind(self)

    @property
    def kind(self) -> Kind:
        """The kind of adapter; `melora_jax.adapters.kind_of` gives its class."""
        return _kind(self.init, self.variant)

    @property
    def latents(self) -> int:
        """Σ r_k, the width of the latent space: the total rank for `identity` and `shuffle`."""
        return sum(self.r)

    @property
    def rank(self) -> int:
        """The rank of the product s·A·B for generic factors wide enough: Σ r_k, or r for mixer `all`."""
        return self.r[0] if self.mixer == "all" else self.latents

    @property
    def scales(self) -> tuple[float, ...]:
        """s_k, the factor of each mini's product."""
        divisor = {"mini": None, "total": float(self.latents), "rslora": math.sqrt(self.latents)}[self.scaling]
        return tuple(alpha / (divisor or r) for alpha, r in zip(self.alpha, self.r, strict=True))

    def parameters(self, d_in: int, d_out: int) -> int:
        """Σ r_k·(d_in/n + d_out/n), the parameters of both factors without padding."""
        return self.latents * (d_in // self.n + d_out // self.n)

    def shapes(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors as they are stored: a [n i r] and b [n r o], r that of the widest mini.

        >>> AdapterSpec(n=2, r=(1, 3), alpha=(16.0, 6.0)).shapes(4, 10)
        {'a': (2, 2, 3), 'b': (2, 3, 5)}
        """
        n, r = self.n, max(self.r)
        return {"a": (n, d_in // n, r), "b": (n, r, d_out // n)}


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
        features in a fixed random order, a control for whether it matters which features a mini reads and writes.
      strategy: how the product is computed: `"batched"`, `"packed"`, `"merged"` (W + ΔW is formed in each step: for
        dense layers of NNX models, without dropout), or `"auto"`. All give the same result. Only `"batched"` has a
        derivative in forward mode (`jax.jvp`) on every platform.
      targets: name suffixes (`["query", "value"]`), one regular expression matched against the whole path, or
        `"all-linear"`, every dense layer except a language model's output layer (PEFT: `target_modules`). Empty puts
        no adapter in.
      exclude: suffixes or one regular expression of layers to leave alone (PEFT: `exclude_modules`).
      layers: keep only sites whose first number in the path is in this list (PEFT: `layers_to_transform`).
      n_pattern, rank_pattern, alpha_pattern: overrides, path suffix or regular expression → value; the first
        match counts, and suffixes may be written with "." or "/".
      modules_to_save: suffixes of modules that are trained whole, such as a new head.
      bias: biases of the base that are trained: `"none"`, `"all"`, or `"lora_only"`, those of adapted layers (as in
        PEFT). `"all"` without targets is BitFit (arXiv 2106.10199).
      train_base: train every parameter of the base, full fine-tuning; targets must be empty.
      init: start of A: `"kaiming"` uniform within 1/sqrt(d_in/n), `"gaussian"` with deviation 1/r. B is zero.
        `"orthogonal"` starts both so that A·B = 0. `"pissa"` starts them at the principal part of the kernel's diagonal
        blocks (arXiv 2404.02948); the adapter is the difference from that start, and the base is not changed.
      variant: `"plain"`, `"dora"` with a learnt norm of each output's weights (arXiv 2402.09353; PEFT: `use_dora`), or
        `"adalora"` with a factor for each latent, where a `RankBudget` keeps the most important (arXiv 2303.10512).
      dtype: dtype the adapter's product is computed in; `None` follows the layer. Factors are kept in float32.

    Raises:
      ValueError: an unknown choice, or a value out of range.
      TypeError: an unknown keyword; for one of PEFT's the message names ours.

    Source: MELoRA (arXiv 2402.17263), section 3.2; the names are those of PEFT's `LoraConfig` where it has one.

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

    if not TYPE_CHECKING:

        def __new__(cls, *args: Any, **settings: Any) -> MELoRAConfig:
            known = [field.name for field in dataclasses.fields(cls)]
            for name in settings:
                if name not in known:
                    raise TypeError(validation.unknown_setting(name, known, "MELoRAConfig"))
            return super().__new__(cls)

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

    def spec_of(self, paths: Sequence[str]) -> AdapterSpec:
        """The adapter of a layer with several paths: that of the first path with an override, else of the first.

        Raises:
          ValueError: overrides that do not fit together, naming the path.
        """
        overrides = (*self.n_pattern, *self.rank_pattern, *self.alpha_pattern)
        overridden = (path for path in paths if any(matches(pattern, path) for pattern in overrides))
        return self.spec(next(overridden, paths[0]))

    def require_overrides(self, adapted: Sequence[Sequence[str]]) -> None:
        """Raises ValueError if an override matches none of the adapted layers, given by the paths that lead to each."""
        for field in _PATTERNS:
            for pattern in getattr(self, field):
                if not any(matches(pattern, path) for paths in adapted for path in paths):
                    first = f"the first is {adapted[0][0]}" if adapted else "there is none"
                    raise ValueError(f"{field}: {pattern!r} matches no adapted layer; {first}")

    @property
    def kind(self) -> Kind:
        """The kind of adapter that every site gets; `melora_jax.adapters.kind_of` gives its class."""
        return _kind(self.init, self.variant)

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
                raise ValueError(validation.unknown_setting(key, known, "the adapter config"))
        return cls(**values)


class Named(Protocol):
    """Something with names: every path that leads to it."""

    @property
    def paths(self) -> tuple[str, ...]: ...


P = TypeVar("P", bound=Named)


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
    """Whether `name`, written with "." or "/", is all of `path` or the whole names at its end."""
    return ("/" + path).endswith("/" + name.replace(".", "/"))


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches `path`, else `default`."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def means(names: Sequence[str] | str, paths: Iterable[str]) -> bool:
    r"""Whether a list of names, or one pattern, means the module that these paths lead to.

    >>> means(["query", "value"], ["layer/0/query"]), means(r"layer/\d/q.*", ["layer/0/query"]), means("", ["query"])
    (True, True, False)
    """
    if isinstance(names, str):
        return bool(names) and any(matches(names, path) for path in paths)
    return any(is_suffix(name, path) for name in names for path in paths)


def named(field: str, names: Sequence[str] | str, modules: Sequence[P], fault: str = "matches no module") -> list[P]:
    """The modules that the names, or the one pattern, of a config's field mean.

    Raises:
      ValueError: a name, or the pattern, means none of them; the message names the nearest there are.
    """
    found = [module for module in modules if means(names, module.paths)]
    if isinstance(names, str) and names and not found:
        raise ValueError(f"{field}={names!r} {fault}; {_nearest(names, modules)}")
    for name in () if isinstance(names, str) else names:
        if not any(means([name], module.paths) for module in found):
            raise ValueError(f"{field}: {name!r} matches no module; {_nearest(name, modules)}")
    return found


def in_layers(layers: Sequence[int] | None, paths: Iterable[str]) -> bool:
    """Whether one of these paths lies in a layer of these numbers; None is all."""
    return layers is None or any(layer_number(path) in layers for path in paths)


def layer_number(path: str) -> int | None:
    """The first name in a path that is a number, else the first that ends in one, as Linen's `layer_0` does."""
    found = re.search(r"(?:^|/)(\d+)(?:/|$)", path) or re.search(r"_(\d+)(?:/|$)", path)
    return int(found[1]) if found else None


def _nearest(name: str, modules: Iterable[Named]) -> str:
    """The nearest names there are, or all where none is near."""
    there = sorted({path.rpartition("/")[2] for module in modules for path in module.paths} - {""})
    there = [leaf for leaf in there if not leaf.isdigit()]
    near = difflib.get_close_matches(name.replace(".", "/").rpartition("/")[2], there, n=3)
    return f"perhaps {' or '.join(map(repr, near))}" if near else f"the names there are: {', '.join(there[:20])}"


def _kind(init: Init, variant: Variant) -> Kind:
    return "pissa" if init == "pissa" else variant


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _as_floats(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_as_floats, value))
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
