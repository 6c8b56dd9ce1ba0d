"""Axes that transforms such as Linen's `nn.scan` and `nn.vmap` add to a layer's arrays, with one entry per copy.

Markers, arrays of zeros stored beside the kernel inside the transform, reveal where the axes are added: outside, they
are the axes whose sizes the markers did not have.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]

FACTOR_AXES = 3
"""The number of axes of one factor, [n i r] or [n r o]."""


@dataclasses.dataclass(frozen=True)
class Lifting:
    """The sizes of the added axes and their positions in the kernel and in the factors."""

    sizes: Shape = ()
    kernel_axes: Shape = ()
    factor_axes: Shape = ()

    @property
    def copies(self) -> int:
        """The number of layers that share one path."""
        return math.prod(self.sizes)

    def init(self, make: Callable[[jax.Array], tuple[jax.Array, jax.Array]], key: jax.Array) -> list[jax.Array]:
        """The factors that `make(key)` returns for each copy, with a key each, stacked along the added axes."""
        made = self._mapped(make)(jax.random.split(key, self.sizes) if self.sizes else key)
        return [jnp.moveaxis(factor, self._front, self.factor_axes) for factor in made]

    def merge(
        self, merge: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], kernel: jax.Array, *factors: jax.Array
    ) -> jax.Array:
        """`merge(kernel, a, b)` for each copy, stacked like the kernel."""
        fronted = [jnp.moveaxis(factor, self.factor_axes, self._front) for factor in factors]
        merged = self._mapped(merge)(jnp.moveaxis(kernel, self.kernel_axes, self._front), *fronted)
        return jnp.moveaxis(merged, self._front, self.kernel_axes)

    def numbers(self) -> jax.Array:
        """The copies' numbers, uint32, in the layout of a factor of size 1."""
        numbers = jnp.arange(self.copies, dtype=jnp.uint32).reshape(*self.sizes, *(1,) * FACTOR_AXES)
        return jnp.moveaxis(numbers, self._front, self.factor_axes)

    @property
    def _front(self) -> Shape:
        return tuple(range(len(self.sizes)))

    def _mapped(self, function: Callable) -> Callable:
        for _ in self.sizes:
            function = jax.vmap(function)
        return function


NOT_LIFTED = Lifting()
"""No added axes: one layer."""


def marker_shapes(kernel_axes: int, whole: Shape) -> tuple[Shape, Shape]:
    """The shapes of a kernel's and a factor's markers, from sizes that do not occur in the `whole` kernel's shape."""
    unused = (size for size in itertools.count(2) if size not in whole)
    sizes = tuple(itertools.islice(unused, max(kernel_axes, FACTOR_AXES)))
    return sizes[:kernel_axes], sizes[:FACTOR_AXES]


def lifting_from_markers(inside: tuple[Shape, Shape], outside: Sequence[Shape]) -> Lifting:
    """The added axes, from the shapes of the two markers inside and outside the transform.

    >>> lifting_from_markers(((2, 4), (2, 4, 5)), [(2, 3, 4), (2, 3, 4, 5)])
    Lifting(sizes=(3,), kernel_axes=(1,), factor_axes=(1,))
    """
    kernel_axes, factor_axes = (
        tuple(axis for axis, size in enumerate(whole) if size not in own)
        for own, whole in zip(inside, outside, strict=True)
    )
    return Lifting(tuple(outside[0][axis] for axis in kernel_axes), kernel_axes, factor_axes)
