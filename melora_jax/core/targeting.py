"""Which of a model's modules a config means, and with what settings. Knows paths and configs, no framework."""

from __future__ import annotations

import dataclasses
from typing import Any

from melora_jax.config import ALL_LINEAR, AdapterSpec, MELoRAConfig, in_layers, layer_number, means, named


@dataclasses.dataclass(frozen=True, eq=False)
class NamedModule:
    """A module with every path that leads to it; the first is its name. `linear` is what `"all-linear"` takes."""

    node: Any
    paths: tuple[str, ...]
    linear: bool


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a config means in a model.

    Attributes:
      saved: the modules of `modules_to_save`.
      adapted: the modules that get an adapter, each with its settings.
    """

    saved: tuple[NamedModule, ...]
    adapted: tuple[tuple[NamedModule, AdapterSpec], ...]


def selection_of(modules: list[NamedModule], config: MELoRAConfig, kinds: str) -> Selection:
    """The modules that `config` trains whole, and those that it adapts.

    Args:
      modules: all modules of the model.
      config: targets, exclusions, layers, overrides and `modules_to_save`.
      kinds: the types that `"all-linear"` takes, for its message.

    Raises:
      ValueError: a name or pattern that means nothing, or nothing is left; the message names the nearest there is.
    """
    saved = named("modules_to_save", config.modules_to_save, modules)
    inside = tuple(f"{path}/" for module in saved for path in module.paths)
    candidates = [module for module in modules if not any(f"{path}/".startswith(inside) for path in module.paths)]
    for name in () if isinstance(config.targets, str) else config.targets:
        there, free = (any(means([name], module.paths) for module in some) for some in (modules, candidates))
        if there and not free:
            raise ValueError(f"targets: {name!r} lies in modules_to_save, which is trained whole; take it out of one")
    if config.targets == ALL_LINEAR:
        matched = [module for module in candidates if module.linear]
        if not matched:
            raise ValueError(
                f"targets={ALL_LINEAR!r} matches no module: there is no {kinds} outside modules_to_save; "
                "name the layers in targets"
            )
    else:
        matched = named("targets", config.targets, candidates)
    excluded = named("exclude", config.exclude, matched, "matches none of the targets")
    left = [module for module in matched if module not in excluded]
    kept = [module for module in left if in_layers(config.layers, module.paths)]
    if missing := set(config.layers or ()) - (numbers := {layer_number(path) for m in left for path in m.paths}):
        there = sorted(number for number in numbers if number is not None)
        raise ValueError(f"layers={sorted(missing)} hold no target; the targets lie in layers {there}")
    if matched and not kept:
        raise ValueError("exclude and layers leave no target; loosen them, or name others in targets")
    adapted = tuple((module, config.spec_of(module.paths)) for module in kept)
    config.require_overrides([module.paths for module in kept])
    return Selection(tuple(saved), adapted)


def selects(config: MELoRAConfig, module: NamedModule) -> bool:
    """Whether `config` adapts this module."""
    targeted = module.linear if config.targets == ALL_LINEAR else means(config.targets, module.paths)
    return targeted and not means(config.exclude, module.paths) and in_layers(config.layers, module.paths)


def require_factors_alone(config: MELoRAConfig, where: str) -> None:
    """Raises ValueError if `config` asks for more than the factors a and b, which is all that `where` can hold."""
    fine = {"bias": "none", "train_base": False, "variant": "plain"}
    asked = [name for name, value in fine.items() if getattr(config, name) != value]
    asked += ["init"] if config.kind != "plain" and not asked else []
    if asked:
        given = f"{asked[0]}={getattr(config, asked[0])!r}"
        raise ValueError(f"{given} is for NNX models; {where} holds plain adapters alone")
    if config.strategy == "merged":
        raise ValueError(f'strategy="merged" is for NNX models; with {where} use strategy="batched" or "auto"')
