"""What `adapt` does to a model, by path: which layers get an adapter, and what is trained beside them.

Everything is checked here, before anything changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx

from melora_jax.adapters.kinds import kind_of
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import FrozenParam
from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.core.targeting import NamedModule, selection_of
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.tree import children, path_of, walk

LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, QuantizedLinear)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `adapt` does to a model. A shared variable goes by the first path that leads to it.

    Attributes:
      config: what was asked for.
      sites: the settings of each adapter, by the path of its layer.
      saved: paths of the variables of `modules_to_save`.
      base: paths of the base's variables that are trained: biases, or all.
    """

    config: MELoRAConfig
    sites: Mapping[str, AdapterSpec]
    saved: frozenset[str]
    base: frozenset[str]


def plan_sites(model: nnx.Module, config: MELoRAConfig) -> Plan:
    """What `config` asks for in `model`.

    Raises:
      ValueError: adapters are there already, a name or pattern matches nothing, a matched module can't be adapted,
        n does not divide its sizes, or a module to save shares a parameter with the frozen rest.
    """
    _require_host(model)
    modules = _modules_of(model)
    selected = selection_of(modules, config, "Linear, LinearGeneral or Einsum")
    for module, spec in selected.adapted:
        kind_of(spec).checked(module.node, spec, module.paths[0])
    saved = _variables_under(module.node for module in selected.saved)
    _refuse_quantized(selected.saved, "modules_to_save")
    _refuse_shared(model, saved, {id(module.node) for module in selected.saved})
    base: set[int] = set()
    if config.train_base:
        _refuse_quantized([NamedModule(model, ("",), False)], "train_base")
        base = _variables_under([model])
    elif config.bias == "all":
        base = _biases_under([model])
    elif config.bias == "lora_only":
        base = _biases_under(module.node for module, _ in selected.adapted)
    if config.bias != "none" and not base:
        raise ValueError(f'bias="{config.bias}" finds no bias in this model; take bias="none"')
    sites = {module.paths[0]: spec for module, spec in selected.adapted}
    return Plan(config, sites, _names_of(model, saved), _names_of(model, base - saved))


def _names_of(model: nnx.Module, variables: set[int]) -> frozenset[str]:
    """The first path that leads to each of these variables."""
    names: dict[int, str] = {}
    for path, node in walk(model):
        if id(node) in variables:
            names.setdefault(id(node), path_of(path))
    return frozenset(names.values())


def _biases_under(roots: Iterable[nnx.Module]) -> set[int]:
    """The variables below these modules whose last name has "bias" in it, by identity."""
    return {
        id(node)
        for root in roots
        for path, node in walk(root)
        if isinstance(node, nnx.Param) and "bias" in path_of(path[-1:])
    }


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


def _modules_of(model: nnx.Module) -> list[NamedModule]:
    """The modules below the model, by every path that leads to each.

    Raises:
      ValueError: there are adapters among them.
    """
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
    # as in PEFT, "all-linear" leaves out the layer that gives a language model's logits
    outputs = {id(getattr(node, "output_embeddings", None)) for node in nodes.values()}
    return [
        NamedModule(node, tuple(paths[identity]), isinstance(node, LINEAR) and identity not in outputs)
        for identity, node in nodes.items()
        if node is not model
    ]


def _variables_under(nodes: Iterable[nnx.Module]) -> set[int]:
    """The parameters below these modules, by identity."""
    return {id(node) for root in nodes for _, node in walk(root) if isinstance(node, nnx.Param)}


def _refuse_quantized(saved: Iterable[NamedModule], key: str) -> None:
    for module in saved:
        for path, node in walk(module.node):
            if isinstance(node, QuantizedLinear):
                where = "/".join(filter(None, (module.paths[0], path_of(path))))
                raise ValueError(
                    f"{key} would train {where}, which is quantised to {node.qtype}; take it out of "
                    f"{key}, or load the model without quantising it"
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
