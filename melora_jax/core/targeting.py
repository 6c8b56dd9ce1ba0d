"""Which of a model's named modules a config selects, and why not. Knows names and configs, no framework's modules."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from melora_jax.config import ALL_LINEAR, AdapterSpec, MELoRAConfig, is_suffix, matches


@dataclasses.dataclass(frozen=True, eq=False)
class NamedModule:
    """A module with every path that leads to it; the first is its name. `linear` is what `"all-linear"` takes."""

    node: Any
    paths: tuple[str, ...]
    linear: bool

    def named_by(self, names: Iterable[str]) -> bool:
        """Whether a name is the end of one of its paths."""
        return any(is_suffix(name, path) for name in names for path in self.paths)

    def matched_by(self, pattern: str) -> bool:
        """Whether a suffix or regular expression matches one of its paths."""
        return any(matches(pattern, path) for path in self.paths)

    def answers_to(self, names: Sequence[str] | str) -> bool:
        """Whether one of a list of names, or one regular expression that is not empty, means it."""
        if isinstance(names, str):
            return bool(names) and self.matched_by(names)
        return self.named_by(names)


def require_factors_alone(config: MELoRAConfig, where: str) -> None:
    """Raises ValueError if `config` asks for more than the factors a and b, which is all that `where` can hold."""
    for name, fine in (("bias", "none"), ("train_base", False), ("variant", "plain")):
        if getattr(config, name) != fine:
            raise ValueError(f"{name}={getattr(config, name)!r} is for NNX models; {where} holds plain adapters alone")
    if config.init == "pissa":
        raise ValueError(f"init='pissa' is for NNX models; {where} holds plain adapters alone")


def modules_to_save(modules: list[NamedModule], config: MELoRAConfig) -> list[NamedModule]:
    """The modules that are trained whole.

    Raises:
      ValueError: a name that matches nothing.
    """
    _require_each("modules_to_save", config.modules_to_save, modules)
    return [module for module in modules if module.named_by(config.modules_to_save)]


def select(
    modules: list[NamedModule], candidates: list[NamedModule], config: MELoRAConfig, kinds: str
) -> list[NamedModule]:
    """The candidates that `config` adapts.

    Args:
      modules: all modules of the model.
      candidates: those outside of what is trained whole.
      config: targets, exclusions and layers.
      kinds: the types that `"all-linear"` takes, for its message.

    Raises:
      ValueError: a name or pattern that matches nothing, or nothing left; the message names the nearest there is.
    """
    for name in () if isinstance(config.targets, str) else config.targets:
        if _names(name, modules) and not _names(name, candidates):
            raise ValueError(f"targets: {name!r} lies in modules_to_save, which is trained whole; take it out of one")
    if config.targets == ALL_LINEAR and not any(module.linear for module in candidates):
        raise ValueError(
            f"targets={ALL_LINEAR!r} matches no module: there is no {kinds} outside modules_to_save; "
            "name the layers in targets"
        )
    if config.targets != ALL_LINEAR:
        _require_matches("targets", config.targets, candidates, "matches no module")
    return _kept([module for module in candidates if _is_targeted(module, config)], config)


def selects(config: MELoRAConfig, module: NamedModule) -> bool:
    """Whether `config` adapts this module."""
    return (
        _is_targeted(module, config) and not module.answers_to(config.exclude) and _is_in_layers(module, config.layers)
    )


def spec_of(module: NamedModule, config: MELoRAConfig) -> AdapterSpec:
    """The module's adapter, by the first of its paths that has an override."""
    overrides = (*config.n_pattern, *config.rank_pattern, *config.alpha_pattern)
    overridden = (path for path in module.paths if any(matches(pattern, path) for pattern in overrides))
    return config.spec(next(overridden, module.paths[0]))


def require_patterns(config: MELoRAConfig, kept: list[NamedModule]) -> None:
    """Raises ValueError if an override matches none of the adapted modules."""
    for field in ("n_pattern", "rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(module.matched_by(pattern) for module in kept):
                first = f"the first is {kept[0].paths[0]}" if kept else "there is none"
                raise ValueError(f"{field}: {pattern!r} matches no adapted layer; {first}")


def _is_targeted(module: NamedModule, config: MELoRAConfig) -> bool:
    return module.linear if config.targets == ALL_LINEAR else module.answers_to(config.targets)


def _kept(matched: list[NamedModule], config: MELoRAConfig) -> list[NamedModule]:
    """The matched modules less `exclude` and those outside `layers`."""
    _require_matches("exclude", config.exclude, matched, "matches none of the targets")
    kept = [module for module in matched if not module.answers_to(config.exclude)]
    if config.layers is not None:
        numbers = {_layer_number(path) for module in kept for path in module.paths}
        missing = sorted(set(config.layers) - numbers)
        if missing:
            there = sorted(number for number in numbers if number is not None)
            raise ValueError(f"layers={missing} hold no target; the targets lie in layers {there}")
        kept = [module for module in kept if _is_in_layers(module, config.layers)]
    if matched and not kept:
        raise ValueError("exclude and layers leave no target; loosen them, or name others in targets")
    return kept


def _is_in_layers(module: NamedModule, layers: Sequence[int] | None) -> bool:
    return layers is None or any(_layer_number(path) in layers for path in module.paths)


def _layer_number(path: str) -> int | None:
    """The first name in a path that is a number, else the first that ends in one, as Linen's `layer_0` does."""
    found = re.search(r"(?:^|/)(\d+)(?:/|$)", path) or re.search(r"_(\d+)(?:/|$)", path)
    return int(found[1]) if found else None


def _require_matches(field: str, names: Sequence[str] | str, modules: list[NamedModule], fault: str) -> None:
    if not isinstance(names, str):
        _require_each(field, names, modules)
    elif names and not any(module.matched_by(names) for module in modules):
        raise ValueError(f"{field}={names!r} {fault}; {_suggest(names, modules)}")


def _require_each(field: str, names: Sequence[str], modules: list[NamedModule]) -> None:
    for name in names:
        if not _names(name, modules):
            raise ValueError(f"{field}: {name!r} matches no module; {_suggest(name, modules)}")


def _names(name: str, modules: list[NamedModule]) -> bool:
    return any(module.named_by([name]) for module in modules)


def _suggest(name: str, modules: list[NamedModule]) -> str:
    """The nearest names there are, or all when they are few."""
    there = sorted({path.rpartition("/")[2] for module in modules for path in module.paths} - {""})
    there = [leaf for leaf in there if not leaf.isdigit()]
    near = difflib.get_close_matches(name.replace(".", "/").rpartition("/")[2], there, n=3)
    return f"perhaps {' or '.join(map(repr, near))}" if near else f"the names there are: {', '.join(there[:20])}"
