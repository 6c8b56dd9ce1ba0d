"""Finds adapters that the model bypasses: each is perturbed, and the output must change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import MELoRAParam


def check_outputs_move(model: nnx.Module, layers: list[MELoRADense], probe: Any) -> None:
    """Runs `model` on `probe` once as it is and once for each adapter with a non-zero B.

    Args:
      model: an adapted model; its factors and state are unchanged afterwards.
      layers: its adapters.
      probe: positional arguments as a tuple, or one array.

    Raises:
      ValueError: a perturbed adapter changes no output; the message names all such sites.
    """
    arguments = probe if isinstance(probe, tuple) else (probe,)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State) -> list[jax.Array]:
        return jax.tree.leaves(nnx.merge(graphdef, state, copy=True)(*arguments))

    base = run(state)
    still = [layer.path for layer in layers if not _moved(base, run(_perturbed(model, layer)))]
    if still:
        raise ValueError(
            f"the adapter at {', '.join(still)} does not change the model's output: the model reads the layer's kernel "
            "instead of calling the layer; leave it out of targets, or call the layer"
        )


def _perturbed(model: nnx.Module, layer: MELoRADense) -> nnx.State:
    """The model's state with ones in this layer's B and in the other trained arrays of its kind; the model is kept."""
    moved = [var for name, var in layer.arrays.items() if name != "a" and isinstance(var, MELoRAParam)]
    kept = [variable[...] for variable in moved]
    for variable, value in zip(moved, kept, strict=True):
        variable[...] = jnp.ones_like(value)
    state = jax.tree.map(lambda leaf: leaf, nnx.state(model))
    for variable, value in zip(moved, kept, strict=True):
        variable[...] = value
    return state


def _moved(before: list[jax.Array], after: list[jax.Array]) -> bool:
    return any(not np.array_equal(x, y, equal_nan=True) for x, y in zip(before, after, strict=True))
