"""An adapter as arrays by path, the common form of all file formats."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from melora_jax.adapters.kinds import kind_of
from melora_jax.config import AdapterSpec, Bias, MELoRAConfig

FORMAT_VERSION = 1
_COMMON = ("dropout", "scaling", "mixer", "strategy", "init", "dtype", "variant")


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """One site's adapter as arrays: a [n i r] and b [n r o]; `lookup` marks an embedding.

    `extras` are the further arrays of DoRA, AdaLoRA and PiSSA by name; see `extra_shapes`.
    """

    spec: AdapterSpec
    a: np.ndarray
    b: np.ndarray
    lookup: bool = False
    extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def d_in(self) -> int:
        """The layer's input size."""
        return self.a.shape[0] * self.a.shape[1]

    @property
    def d_out(self) -> int:
        """The layer's output size."""
        return self.b.shape[0] * self.b.shape[2]


def extra_shapes(spec: AdapterSpec, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """The arrays that an adapter has beside a and b: DoRA's norms, AdaLoRA's diagonal, PiSSA's start values.

    >>> extra_shapes(AdapterSpec(n=2, r=(3, 3), alpha=(1.0, 1.0), variant="adalora"), 4, 6)
    {'e': (2, 3)}
    """
    shapes = kind_of(spec).shapes(spec, d_in, d_out)
    return {name: shape for name, shape in shapes.items() if name not in ("a", "b")}


@dataclasses.dataclass(frozen=True)
class AdapterTree:
    """Everything an adapter file holds.

    Attributes:
      config: what the model was adapted with.
      sites: the factors by site path.
      saved: other trained parameters by their paths in the host, in Flax's layout: those of `modules_to_save`, biases,
        or all in full fine-tuning.
      base_model: name or folder of the base checkpoint, if known.
      task: the base model's task, if known.
    """

    config: MELoRAConfig
    sites: Mapping[str, SiteFactors]
    saved: Mapping[str, np.ndarray]
    base_model: str | None = None
    task: str | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """All arrays by their key in our file."""
        factors = {
            f"{path}/{name}": array
            for path, site in self.sites.items()
            for name, array in {"a": site.a, "b": site.b, **site.extras}.items()
        }
        return factors | dict(self.saved)

    def facts(self) -> dict[str, Any]:
        """The contents of our JSON file."""
        sites = {path: dataclasses.asdict(site.spec) | {"lookup": site.lookup} for path, site in self.sites.items()}
        return {
            "format": "melora_jax",
            "version": FORMAT_VERSION,
            "base_model": self.base_model,
            "task": self.task,
            "config": json.loads(self.config.to_json()),
            "sites": sites,
        }


def config_of_sites(
    specs: Mapping[str, AdapterSpec], modules_to_save: Iterable[str] = (), bias: Bias = "none"
) -> MELoRAConfig:
    """The config that adapts exactly the layers at these paths, each with its spec.

    Sites are named by their whole paths. The most common n, r and alpha are those of the config. If others differ,
    every site has an entry in the pattern, longest path first, so that no site matches another's entry.

    Raises:
      ValueError: specs that differ in what a config says once for all: dropout, scaling, mixer, strategy, init, dtype,
        variant.

    >>> config = config_of_sites({"a/query": AdapterSpec(n=1, r=(4,), alpha=(8.0,))})
    >>> config.targets, config.n, config.r, config.spec("a/query").scales
    (('a/query',), 1, 4, (2.0,))
    """
    if not specs:
        return MELoRAConfig(targets=(), modules_to_save=tuple(modules_to_save), bias=bias)
    usual = Counter(specs.values()).most_common(1)[0][0]
    common = {name: getattr(usual, name) for name in _COMMON}
    for path, spec in specs.items():
        for name, value in common.items():
            if getattr(spec, name) != value:
                raise ValueError(f"{name} is {getattr(spec, name)!r} at {path} and {value!r} elsewhere; it must be one")
    settings: dict[str, Any] = common | {"n": usual.n, "r": _short(usual.r), "alpha": _short(usual.alpha)}
    for name, pattern in (("n", "n_pattern"), ("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        values = {path: _short(getattr(specs[path], name)) for path in sorted(specs, key=len, reverse=True)}
        settings[pattern] = values if len(set(values.values())) > 1 else {}
    return MELoRAConfig(targets=tuple(specs), modules_to_save=tuple(modules_to_save), bias=bias, **settings)


def _short(values: Any) -> Any:
    """The one value that all minis share, or the tuple."""
    return values[0] if isinstance(values, tuple) and len(set(values)) == 1 else values
