"""The layers of a deep model, run one after another, or equal ones as one `jax.lax.scan` over stacked variables.

A `Layers` list holds layers, each with its number, and, once `stack_layers` has been at work, runs of equal ones::

    layers/0  layers/1  ...  layers/29      →      one LayerRun: block/0, variables [30, ...]

Compile time then grows with the number of runs and not with the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from melora_jax.core.dropout import numbered_layer

# What a layer does: (layer, x, its number, its path, its entry of the cache) -> (x, that entry again)
Call = Callable[[Any, jax.Array, int, str, Any], tuple[jax.Array, Any]]


class LayerRun(nnx.Module):
    """Layers `first`, `first + 1` ... that repeat a block of `len(block)` layers `repeats` times.

    Args:
      block: the layers of one repeat; each variable has the repeats as its first axis.
      first: the number of the first layer.
      repeats: how often the block stands there.
    """

    def __init__(self, block: Sequence[nnx.Module], first: int, repeats: int) -> None:
        self.block = nnx.List(block)
        self.first = first
        self.repeats = repeats

    @property
    def numbers(self) -> range:
        """The numbers of the layers in the run."""
        return range(self.first, self.first + self.repeats * len(self.block))

    def scan(self, x: jax.Array, call: Call, path: str, cached: Sequence[Any]) -> tuple[jax.Array, list[Any]]:
        """Runs the layers. A cache has an entry for each layer of the block, with the repeats as first axis."""
        graphdef, state = nnx.split(self.block)
        size = len(self.block)

        def repeat(x: jax.Array, at: tuple[jax.Array, nnx.State, list[Any]]) -> tuple[jax.Array, list[Any]]:
            start, values, entries = at
            kept = []
            for place, layer in enumerate(nnx.merge(graphdef, values, copy=True)):
                with numbered_layer(start + place, str(self.first + place)):
                    x, entry = call(layer, x, self.first + place, f"{path}/*", entries[place])
                kept.append(entry)
            return x, kept

        starts = jnp.arange(self.repeats) * size + self.first
        return jax.lax.scan(repeat, x, (starts, state, list(cached)))


class Layers(nnx.List):
    """A model's layers in order. Entries are layers and `LayerRun`s of them."""

    def run(
        self, x: jax.Array, call: Call, path: str, cached: Sequence[Any] | None = None
    ) -> tuple[jax.Array, list[Any]]:
        """Passes `x` through all layers.

        Args:
          x: what the first layer takes.
          call: calls one layer. In a run it is traced once for each layer of the block, whose number stands for the
            others': they differ in nothing but the values of their variables. "*" in the path stands for the number.
          path: of this list.
          cached: an entry for each of `leads()`; None where layers keep nothing.

        Returns:
          The last layer's output, and the entries again.
        """
        left = iter([None] * len(self.leads()) if cached is None else cached)
        kept: list[Any] = []
        number = 0
        for entry in self:
            if isinstance(entry, LayerRun):
                x, entries = entry.scan(x, call, path, [next(left) for _ in entry.block])
                kept += entries
                number = entry.numbers.stop
            else:
                x, own = call(entry, x, number, f"{path}/{number}", next(left))
                kept.append(own)
                number += 1
        return x, kept

    def leads(self) -> list[tuple[int, ...]]:
        """The axes before those of a cache's arrays: none for a layer, the repeats for each layer of a run's block."""
        return [lead for entry in self for lead in _leads_of(entry)]


def _leads_of(entry: nnx.Module) -> Iterator[tuple[int, ...]]:
    if isinstance(entry, LayerRun):
        return iter([(entry.repeats,)] * len(entry.block))
    return iter([()])
