"""Adapters taken out again: `merge` puts their updates into the kernels, `unwrap` leaves the base as it was.

Both return new models of plain Flax layers, unstacked; the adapted model stays.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
from flax import nnx

from melora_jax.adapters.adapt import CONFIG_ATTRIBUTE, adapters_of, config_of, require_live
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import BaseParam, FrozenParam, thaw
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.scan_layers import unstack_layers
from melora_jax.nn.tree import rewrite, walk

_log = logging.getLogger("melora_jax")

M = TypeVar("M", bound=nnx.Module)


@overload
def merge(model: MELoRADense) -> Any: ...
@overload
def merge(model: M) -> M: ...
def merge(model: nnx.Module) -> nnx.Module:
    """A new model (or layer) of plain Flax layers, with W + ΔW in place of each adapted kernel.

    The sum is taken in float32 and rounded to the kernel's dtype. A quantised kernel becomes a plain one of the
    computation's dtype with the values that training saw; the quantisation error stays, and the logger "melora_jax"
    says how many kernels it concerns. A kernel that was tied to an unadapted layer is untied: only the adapted layer's
    copy changes. `model` is left unchanged.

    Args:
      model: an adapted model, whose layers may be stacked, or one adapted layer.

    Raises:
      ValueError: there is nothing to merge, or a training step has deleted the model's arrays.

    >>> layer = MELoRADense(8, 12, n=4, rngs=nnx.Rngs(0))
    >>> type(merge(layer)).__name__
    'Linear'
    """
    return _plain(model, merged=True)


@overload
def unwrap(model: MELoRADense) -> Any: ...
@overload
def unwrap(model: M) -> M: ...
def unwrap(model: nnx.Module) -> nnx.Module:
    """A new model: the base without its adapters, parameters typed and valued as before `adapt`.

    Modules of `modules_to_save`, and parameters of the base that were trained, keep what they learned. `model` is left
    unchanged.

    Args:
      model: an adapted model, whose layers may be stacked, or one adapted layer.

    Raises:
      ValueError: the model has no adapters, or a training step has deleted its arrays.

    >>> layer = MELoRADense(8, 12, n=4, rngs=nnx.Rngs(0))
    >>> plain = unwrap(layer)
    >>> type(plain).__name__, bool((plain.kernel == layer.base.kernel).all())
    ('Linear', True)
    """
    return _plain(model, merged=False)


def _plain(model: nnx.Module, merged: bool) -> nnx.Module:
    if not isinstance(model, MELoRADense) and not adapters_of(model):
        config_of(model)  # a model that was trained without sites is fine
    require_live(model)
    if merged:
        _say_rounding(model)
    copy = unstack_layers(nnx.clone(model))
    # A training step that donates the model's arrays must not delete those of the new model.
    _, _, donated = nnx.split(copy, FrozenParam, ...)
    nnx.update(copy, jax.tree.map(jnp.copy, donated))
    return _restore(copy, merged)


def _say_rounding(model: nnx.Module) -> None:
    """What merging a quantised base rounds."""
    layers = [node for _, node in walk(model) if isinstance(node, QuantizedLinear)]
    if layers:
        _log.info(
            "merge: %d kernels in %s become %s; their quantisation error, which training saw, stays in them, and "
            "W + ΔW is rounded to %s",
            len(layers),
            layers[0].qtype,
            layers[0].dtype.name,
            layers[0].dtype.name,
        )


def _restore(model: nnx.Module, merged: bool) -> nnx.Module:
    """Takes the adapters out again, in place, and thaws the base."""
    # Two tables: a replaced layer may be freed, and an object of the second pass have its id.
    layers: dict[int, Any] = {}
    variables: dict[int, Any] = {}

    def swap_layer(path: Any, node: Any) -> Any:
        if isinstance(node, MELoRADense) and id(node) not in layers:
            layers[id(node)] = _merged_layer(node) if merged else node.base
        elif merged and isinstance(node, QuantizedLinear) and id(node) not in layers:
            layers[id(node)] = node.dequantized()
        return layers.get(id(node), node)

    def swap_variable(path: Any, node: Any) -> Any:
        if isinstance(node, FrozenParam | BaseParam) and id(node) not in variables:
            variables[id(node)] = thaw(node)
        return variables.get(id(node), node)

    model = rewrite(rewrite(model, swap_layer), swap_variable)
    if hasattr(model, CONFIG_ATTRIBUTE):
        delattr(model, CONFIG_ATTRIBUTE)
    return model


def _merged_layer(layer: MELoRADense) -> nnx.Module:
    name, kernel = layer.view.kernel_name, layer.merged()
    base = layer.base.dequantized() if isinstance(layer.base, QuantizedLinear) else layer.base
    old = getattr(base, name)
    setattr(base, name, type(old).from_metadata(kernel, old.get_metadata()))
    return base
