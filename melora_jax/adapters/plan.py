"""Which modules a config names: sites to adapt and modules to train whole, all checked before anything changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import FrozenParam
from melora_jax.adapters.variants import layer_type
from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.core.targeting import NamedModule, modules_to_save, require_patterns, select, spec_of
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.tree import children, path_of, walk

LINEAR = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, QuantizedLinear)


@dataclasses.dataclass(frozen=True)
class PlannedSite:
    """A layer that will be adapted."""

    path: str
    layer: nnx.Module
    spec: AdapterSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sites by the identity of their layer, and the identities of the variables that are trained beside them.

    Attributes:
      sites: what gets an adapter.
      saved_variables: those of `modules_to_save`.
      base_variables: those of the base: biases, or all.
    """

    sites: dict[int, PlannedSite]
    saved_variables: frozenset[int]
    base_variables: frozenset[int] = frozenset()


def plan_sites(model: nnx.Module, config: MELoRAConfig) -> Plan:
    """What `config` asks for in `model`.

    Raises:
      ValueError: adapters are there already, a name or pattern matches nothing, a matched module can't be adapted,
        n does not divide its sizes, or a module to save shares a parameter with the frozen rest.
    """
    _require_host(model)
    modules = _modules_of(model)
    saved = modules_to_save(modules, config)
    _refuse_quantized(saved, "modules_to_save")
    saved_variables = _variables_under([module.node for module in saved])
    _refuse_shared(model, saved_variables, {id(module.node) for module in saved})
    inside_saved = {id(node) for module in saved for _, node in walk(module.node)}
    candidates = [module for module in modules if id(module.node) not in inside_saved and module.node is not model]
    kept = select(modules, candidates, config, "Linear, LinearGeneral or Einsum")
    sites = {id(module.node): _planned(module, config) for module in kept}
    require_patterns(config, kept)
    base_variables = _base_variables(model, config, [module.node for module in kept]) - saved_variables
    return Plan(sites, frozenset(saved_variables), frozenset(base_variables))


def _base_variables(model: nnx.Module, config: MELoRAConfig, adapted: list[nnx.Module]) -> set[int]:
    """The variables of the base that are trained, those of `modules_to_save` among them."""
    if config.train_base:
        _refuse_quantized([NamedModule(model, ("",), False)], "train_base")
        return _variables_under([model])
    roots = {"none": [], "all": [model], "lora_only": adapted}[config.bias]
    biases = {
        id(node)
        for root in roots
        for path, node in walk(root)
        if isinstance(node, nnx.Param) and "bias" in path_of(path[-1:])
    }
    if roots and not biases:
        raise ValueError(f'bias="{config.bias}" finds no bias in this model; take bias="none"')
    return biases


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
    ]


def _planned(module: NamedModule, config: MELoRAConfig) -> PlannedSite:
    path, spec = module.paths[0], spec_of(module, config)
    layer_type(spec).checked(module.node, spec, path)
    return PlannedSite(path, module.node, spec)


def _variables_under(nodes: list[nnx.Module]) -> set[int]:
    return {id(node) for root in nodes for _, node in walk(root) if isinstance(node, nnx.Param)}


def _refuse_quantized(saved: list[NamedModule], key: str) -> None:
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
