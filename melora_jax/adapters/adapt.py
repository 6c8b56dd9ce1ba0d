"""`adapt` puts adapters into a model, in place; `describe` counts what is in one.

`plan_sites` checks everything before `adapt` changes anything, so a model that it refuses is left unchanged.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import jax
from flax import nnx

from melora_jax.adapters.kinds import kind_of
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import BaseParam, FrozenParam, MELoRAParam, freeze, in_float32, trained
from melora_jax.adapters.plan import Plan, plan_sites
from melora_jax.adapters.probing import check_outputs_move
from melora_jax.adapters.tensor_parallel import factor_sharding, whole_notes
from melora_jax.config import MELoRAConfig
from melora_jax.core.initializers import start_key
from melora_jax.core.report import Adaptation, rank_note, served_rank
from melora_jax.nn.scan_layers import is_stacked, unstacked
from melora_jax.nn.sharding import put
from melora_jax.nn.tree import path_of, rewrite, walk

CONFIG_ATTRIBUTE = "melora_config"

_log = logging.getLogger("melora_jax")


def adapt(model: nnx.Module, config: MELoRAConfig, *, rngs: nnx.Rngs, probe: Any = None) -> Adaptation:
    """Puts mini-adapters into `model`, in place, and freezes the rest.

    Every `nnx.Param` becomes a `FrozenParam`, except those of `modules_to_save`, which stay, and those that `bias` or
    `train_base` trains, which become `BaseParam`; both are cast to float32. Each matched layer is wrapped in a
    `MELoRADense`, or in the class of its kind, whose factors are float32. Shared layers and tied variables stay shared.

    Args:
      model: any tree of NNX modules, lists, dicts and tuples.
      config: what to adapt.
      rngs: source of the factors' start values. Each site folds in its path, so its values do not depend on the other
        sites or their order.
      probe: inputs of one forward pass, a tuple of positional arguments or one array. If given, each adapter is
        perturbed and the output must change; this finds models that read a kernel instead of calling its layer.

    Returns:
      An `Adaptation`: sites and parameter counts. It prints as a table.

    Raises:
      ValueError: the model has adapters already, or its layers are stacked; a target, override, exclusion or module to
        save matches nothing; a matched module can't be adapted or n does not divide it; the probe finds a site without
        effect. The message names the path and the remedy, and the model is left unchanged.

    Source: MELoRA (arXiv 2402.17263), section 3.2.

    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.relu)
    >>> config = MELoRAConfig(n=2, r=1, targets="all-linear", strategy="packed")
    >>> print(adapt(model, config, rngs=nnx.Rngs(0)))
    site      d_in  d_out  n  r  rank  parameters  strategy
    layers/0     4      6  2  1     2          10  packed
    adapters 10 + head 0 = 10 trainable (25.00 %), 30 frozen
    """
    if is_stacked(model):
        raise ValueError(
            "the model's layers are stacked; adapt it first, or take them apart with unstack_layers(model)"
        )
    plan = plan_sites(model, config)
    if probe is not None:
        trial = nnx.clone(model)
        _put_adapters(trial, plan, nnx.Rngs(0))
        check_outputs_move(trial, list(adapters_of(trial).values()), probe)
    _put_adapters(model, plan, rngs)
    adaptation = describe(model)
    _warn_of_rank(adaptation)
    return adaptation


def _put_adapters(model: nnx.Module, plan: Plan, rngs: nnx.Rngs) -> None:
    layers = {path_of(path): node for path, node in walk(model)}
    key = rngs.params()
    wrapped: dict[int, MELoRADense] = {}
    for path, spec in plan.sites.items():
        adapted = kind_of(spec).wrap(layers[path], spec, path=path, rngs=nnx.Rngs(start_key(key, path)))
        _place_factors(adapted)
        wrapped[id(layers[path])] = adapted
    _freeze_base(model, plan)
    rewrite(model, lambda path, node: wrapped.get(id(node), node))
    setattr(model, CONFIG_ATTRIBUTE, plan.config)


def _warn_of_rank(adaptation: Adaptation) -> None:
    """Warns, before any training, if no serving engine takes the adapters."""
    rank = max((site.rank for site in adaptation.sites), default=0)
    if rank and served_rank(rank) is None:
        _log.warning("exported as plain LoRA, these adapters have rank %d, %s", rank, rank_note(rank))


def _place_factors(layer: MELoRADense) -> None:
    """Puts fresh factors on the mesh that the base's kernel lies on."""
    sharding = factor_sharding(layer.kernel_variable.get_raw_value(), layer.spec)
    if sharding is not None:
        for factor in (layer.a, layer.b):
            factor.set_value(put(factor[...], sharding))


def _freeze_base(model: nnx.Module, plan: Plan) -> None:
    """Re-types parameters: those that are trained stay `nnx.Param`, in float32; all others become `FrozenParam`."""
    fresh: dict[int, nnx.Variable] = {}

    def swap(path: Any, node: Any) -> Any:
        if not isinstance(node, nnx.Param):
            return node
        if id(node) not in fresh:  # first asked at the path that names it
            name = path_of(path)
            retype = _as_float32 if name in plan.saved else trained if name in plan.base else freeze
            fresh[id(node)] = retype(node)
        return fresh[id(node)]

    rewrite(model, swap)


def _as_float32(variable: nnx.Variable) -> nnx.Variable:
    # The layer's own dtype still decides how it computes.
    value = in_float32(variable.get_raw_value())
    return variable if value.dtype == variable.dtype else type(variable).from_metadata(value, variable.get_metadata())


def adapters_of(model: nnx.Module) -> dict[str, MELoRADense]:
    """The adapted layers of a model by path, each once, in the order of the tree."""
    found: dict[int, tuple[str, MELoRADense]] = {}
    for path, node in walk(model):
        if isinstance(node, MELoRADense):
            found.setdefault(id(node), (path_of(path), node))
    return dict(found.values())


def config_of(model: nnx.Module) -> MELoRAConfig:
    """The config that `model` was adapted with.

    Raises:
      ValueError: it was not.
    """
    config = getattr(model, CONFIG_ATTRIBUTE, None)
    if config is None:
        kind = type(model).__name__
        raise ValueError(f"{kind} was not adapted; call melora_jax.adapt(model, config, rngs=...) first")
    return config


def require_live(model: nnx.Module) -> None:
    """Raises ValueError if a step that donates its state has deleted one of the model's arrays."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_raw_value()
        if isinstance(value, jax.Array) and value.is_deleted():
            raise ValueError(
                f"the array of {path_of(path)} is gone: a training step has taken it over; call nnx.update(model, "
                "state.trainable, state.host) with the step's newest state first"
            )


def describe(model: nnx.Module) -> Adaptation:
    """The `Adaptation` of an adapted model, counted from the model as it is.

    Args:
      model: an adapted model; its layers may be stacked, and its arrays may be shapes.

    Raises:
      ValueError: the model was not adapted.

    >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.relu)
    >>> _ = adapt(model, MELoRAConfig(n=2, r=1, targets="all-linear"), rngs=nnx.Rngs(0))
    >>> found = describe(model)
    >>> found.sites[0].path, found.trainable, found.frozen
    ('layers/0', 10, 30)
    """
    config = config_of(model)
    adapters = adapters_of(unstacked(model, nnx.Nothing()))
    sites = tuple(layer.row(path) for path, layer in adapters.items())
    return Adaptation(
        sites=sites,
        adapter=sum(site.parameters for site in sites),
        head=_size_of(model, nnx.Param) - _size_of(model, MELoRAParam) - _size_of(model, BaseParam),
        base=_size_of(model, BaseParam),
        frozen=_size_of(model, FrozenParam),
        saved=tuple(config.modules_to_save),
        notes=whole_notes(
            (path, layer.kernel_variable.get_raw_value(), layer.spec) for path, layer in adapters.items()
        ),
    )


def _size_of(model: nnx.Module, kind: type[nnx.Variable]) -> int:
    return sum(math.prod(variable.shape) for _, variable in nnx.to_flat_state(nnx.state(model, kind)))
