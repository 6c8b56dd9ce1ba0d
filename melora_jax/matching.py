"""Which modules a config names: sites to adapt and modules to train whole, all checked before anything changes."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flax import nnx

from melora_jax.config import ALL_LINEAR, AdapterSpec, MELoRAConfig, is_suffix, matches
from melora_jax.graph import children, path_of, walk
from melora_jax.layers import FrozenParam, MELoRADense, checked_view
from melora_jax.quantization import QuantizedLinear

LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, QuantizedLinear)


@dataclasses.dataclass(frozen=True)
class PlannedSite:
    """A layer that will be adapted."""

    path: str
    layer: nnx.Module
    spec: AdapterSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sites by the identity of their layer, and the identities of the variables that are trained whole."""

    sites: dict[int, PlannedSite]
    saved_variables: frozenset[int]


@dataclasses.dataclass(frozen=True, eq=False)
class _Module:
    """A module with every path that leads to it; the first is its name."""

    node: nnx.Module
    paths: tuple[str, ...]

    def named_by(self, names: Iterable[str]) -> bool:
        return any(is_suffix(name, path) for name in names for path in self.paths)

    def matched_by(self, pattern: str) -> bool:
        return any(matches(pattern, path) for path in self.paths)


def plan_sites(model: nnx.Module, config: MELoRAConfig) -> Plan:
    """What `config` asks for in `model`.

    Raises:
      ValueError: adapters are there already, a name or pattern matches nothing, a matched module can't be adapted,
        n does not divide its sizes, or a module to save shares a parameter with the frozen rest.
    """
    _require_host(model)
    modules = _modules_of(model)
    saved = [module for module in modules if module.named_by(config.modules_to_save)]
    _require_each("modules_to_save", config.modules_to_save, modules)
    _refuse_quantized(saved)
    saved_variables = _variables_under([module.node for module in saved])
    _refuse_shared(model, saved_variables, {id(module.node) for module in saved})
    inside_saved = {id(node) for module in saved for _, node in walk(module.node)}
    candidates = [module for module in modules if id(module.node) not in inside_saved and module.node is not model]
    for name in () if isinstance(config.targets, str) else config.targets:
        if _names(name, modules) and not _names(name, candidates):
            raise ValueError(f"targets: {name!r} lies in modules_to_save, which is trained whole; take it out of one")
    # as in PEFT, "all-linear" leaves out the layer that gives a language model's logits
    outputs = {id(getattr(module.node, "output_embeddings", None)) for module in modules}
    matched = _targeted(candidates, config, outputs)
    kept = _kept(matched, config)
    sites = {id(module.node): _planned(module, config) for module in kept}
    _require_patterns(config, [path for module in kept for path in module.paths])
    return Plan(sites, frozenset(saved_variables))


def _require_host(model: nnx.Module) -> None:
    """The model must be something that layers can be replaced in, and that can carry the config as an attribute."""
    if not isinstance(model, nnx.Module) or isinstance(model, nnx.Dict):
        kind = type(model).__name__
        raise ValueError(
            f"the model is a {kind}, where adapt can't leave its config; make it an attribute of an nnx.Module"
        )
    if isinstance(model, (*LINEAR, nnx.Embed)):
        kind = type(model).__name__
        raise ValueError(f"the model is itself a {kind}, which can't be replaced in place; take MELoRADense.wrap")
    reached = {id(node): path_of(path) for path, node in walk(model) if isinstance(node, nnx.Variable)}
    every = [path_of(path) for path, _ in nnx.to_flat_state(nnx.state(model))]
    if len(every) > len(reached):
        missed = next(path for path in every if path not in reached.values())
        raise ValueError(
            f"{missed} lies in a container that adapt can't look into; hold modules in modules, lists, dicts or tuples"
        )


def _modules_of(model: nnx.Module) -> list[_Module]:
    nodes: dict[int, nnx.Module] = {}
    paths: dict[int, list[str]] = {}
    for path, node in walk(model):
        if isinstance(node, MELoRADense | FrozenParam):
            where = path_of(path) or "its root"
            raise ValueError(
                f"the model has adapters already (at {where}); "
                "take melora_jax.unwrap(model) or melora_jax.merge(model) first"
            )
        if isinstance(node, nnx.Module):
            nodes.setdefault(id(node), node)
            paths.setdefault(id(node), []).append(path_of(path))
    return [_Module(node, tuple(paths[identity])) for identity, node in nodes.items()]


def _targeted(modules: list[_Module], config: MELoRAConfig, outputs: set[int]) -> list[_Module]:
    if config.targets == ALL_LINEAR:
        linear = [module for module in modules if isinstance(module.node, LINEAR) and id(module.node) not in outputs]
        if not linear:
            raise ValueError(
                f"targets={ALL_LINEAR!r} matches no module: there is no Linear, LinearGeneral or Einsum outside "
                "modules_to_save; name the layers in targets"
            )
        return linear
    if isinstance(config.targets, str):
        found = [module for module in modules if module.matched_by(config.targets)]
        if config.targets and not found:
            raise ValueError(f"targets={config.targets!r} matches no module; {_suggest(config.targets, modules)}")
        return found
    _require_each("targets", config.targets, modules)
    return [module for module in modules if module.named_by(config.targets)]


def _kept(matched: list[_Module], config: MELoRAConfig) -> list[_Module]:
    """The matched modules less `exclude` and those outside `layers`."""
    if isinstance(config.exclude, str):
        excluded = [module for module in matched if config.exclude and module.matched_by(config.exclude)]
        if config.exclude and not excluded:
            near = _suggest(config.exclude, matched)
            raise ValueError(f"exclude={config.exclude!r} matches none of the targets; {near}")
    else:
        _require_each("exclude", config.exclude, matched)
        excluded = [module for module in matched if module.named_by(config.exclude)]
    kept = [module for module in matched if module not in excluded]
    if config.layers is not None:
        numbers = {_layer_number(path) for module in kept for path in module.paths}
        missing = sorted(set(config.layers) - numbers)
        if missing:
            there = sorted(number for number in numbers if number is not None)
            raise ValueError(f"layers={missing} hold no target; the targets lie in layers {there}")
        kept = [module for module in kept if any(_layer_number(path) in config.layers for path in module.paths)]
    if matched and not kept:
        raise ValueError("exclude and layers leave no target; loosen them, or name others in targets")
    return kept


def _planned(module: _Module, config: MELoRAConfig) -> PlannedSite:
    path = module.paths[0]
    spec = config.spec(next((path for path in module.paths if _overridden(config, path)), path))
    checked_view(module.node, spec.n, path)
    return PlannedSite(path, module.node, spec)


def _overridden(config: MELoRAConfig, path: str) -> bool:
    return any(matches(pattern, path) for pattern in (*config.n_pattern, *config.rank_pattern, *config.alpha_pattern))


def _layer_number(path: str) -> int | None:
    found = re.search(r"(?:^|/)(\d+)(?:/|$)", path)
    return int(found[1]) if found else None


def _variables_under(nodes: list[nnx.Module]) -> set[int]:
    return {id(node) for root in nodes for _, node in walk(root) if isinstance(node, nnx.Param)}


def _refuse_quantized(saved: list[_Module]) -> None:
    for module in saved:
        for path, node in walk(module.node):
            if isinstance(node, QuantizedLinear):
                where = "/".join(filter(None, (module.paths[0], path_of(path))))
                raise ValueError(
                    f"modules_to_save would train {where}, which is quantised to {node.qtype}; take it out of "
                    "modules_to_save, or load the model without quantising it"
                )


def _refuse_shared(model: nnx.Module, saved: set[int], saved_modules: set[int]) -> None:
    """A parameter of a module to save must not be reached from outside too: training would change the frozen base."""
    inside: dict[int, str] = {}
    outside: dict[int, str] = {}
    entered: set[tuple[int, bool]] = set()

    def visit(path: tuple[Any, ...], node: Any, within: bool) -> None:
        within = within or id(node) in saved_modules
        if id(node) in saved:
            (inside if within else outside).setdefault(id(node), path_of(path))
        if (id(node), within) in entered:
            return
        entered.add((id(node), within))
        for key, child in children(node):
            visit((*path, key), child, within)

    visit((), model, False)
    for identity in saved:
        if identity in outside:
            raise ValueError(
                f"modules_to_save would train {inside[identity]}, which is the same array as {outside[identity]} in "
                "the frozen base; name both modules in modules_to_save, or neither"
            )


def _names(name: str, modules: list[_Module]) -> bool:
    return any(module.named_by([name]) for module in modules)


def _require_each(field: str, names: Sequence[str], modules: list[_Module]) -> None:
    for name in names:
        if not _names(name, modules):
            raise ValueError(f"{field}: {name!r} matches no module; {_suggest(name, modules)}")


def _require_patterns(config: MELoRAConfig, paths: list[str]) -> None:
    for field in ("n_pattern", "rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(matches(pattern, path) for path in paths):
                first = f"the first is {paths[0]}" if paths else "there is none"
                raise ValueError(f"{field}: {pattern!r} matches no adapted layer; {first}")


def _suggest(name: str, modules: list[_Module]) -> str:
    """The nearest names there are, or all when they are few."""
    there = sorted({path.rpartition("/")[2] for module in modules for path in module.paths} - {""})
    there = [leaf for leaf in there if not leaf.isdigit()]
    near = difflib.get_close_matches(name.replace(".", "/").rpartition("/")[2], there, n=3)
    return f"perhaps {' or '.join(map(repr, near))}" if near else f"the names there are: {', '.join(there[:20])}"
