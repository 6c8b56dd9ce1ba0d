"""One adapted layer of a Linen model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from melora_jax.config import AdapterSpec, Strategy
from melora_jax.core.dense_view import unadaptable, view_at_call
from melora_jax.core.dropout import numbered_layer
from melora_jax.core.initializers import init_factors, start_key
from melora_jax.core.products.latents import attend_update, update
from melora_jax.core.products.merged import merged_kernel
from melora_jax.core.products.plan import plan_product, planned_strategy
from melora_jax.core.report import Site
from melora_jax.linen.trace import Layer
from melora_jax.linen.tree import Flat, Path, parts


@dataclasses.dataclass(frozen=True)
class LinenSite:
    """One adapted layer: its path in `params`, its adapter's settings and the layout of its kernel."""

    path: str
    spec: AdapterSpec
    layer: Layer

    @property
    def strategy(self) -> Strategy:
        """What `spec.strategy` stands for on the platform traced for."""
        return planned_strategy(self.spec)

    def row(self) -> Site:
        """The site as `print(adapted)` shows it: its parameters are those of all copies of the layer."""
        view, spec = self.layer.view, self.spec
        parameters = spec.parameters(view.d_in, view.d_out) * self.layer.lifting.copies
        sizes = (view.d_in, view.d_out)
        return Site.of(self.path, spec, sizes, rank=spec.rank, parameters=parameters, strategy=self.strategy)

    @property
    def places(self) -> tuple[Path, Path]:
        """The paths of a and b in the collection."""
        return (*parts(self.path), "a"), (*parts(self.path), "b")

    def init(self, key: jax.Array) -> Flat:
        """Initial values of both factors, different for each copy of the layer."""

        def make(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return init_factors(key, self.layer.view.d_in, self.layer.view.d_out, self.spec)

        return dict(zip(self.places, self.layer.lifting.init(make, start_key(key, self.path)), strict=True))

    def merged(self, kernel: Any, a: jax.Array, b: jax.Array) -> Any:
        """W + ΔW in the kernel's layout, dtype and metadata."""

        def merge(*arrays: jax.Array) -> jax.Array:
            return merged_kernel(self.spec, self.layer.view, *arrays)

        return meta.replace_boxed(kernel, self.layer.lifting.merge(merge, meta.unbox(kernel), a, b))

    def update(
        self, method: str, x: jax.Array, y: jax.Array, factors: Mapping[str, jax.Array], equation: str | None
    ) -> jax.Array:
        """What the adapter adds to the output of a call.

        Args:
          method: the layer's method, `"__call__"` or `"attend"`.
          x, y: its input and output.
          factors: a and b and, in a stack with dropout, the layer's number.
          equation: the equation of an Einsum's call.

        Raises:
          ValueError: the factors have other shapes, or the equation uses the kernel differently from the first call.
        """
        a, b, view = factors.get("a"), factors.get("b"), self.layer.view
        if a is None or b is None or {"a": a.shape, "b": b.shape} != self.spec.shapes(view.d_in, view.d_out):
            raise unadaptable(self.path, "a transform around it changes the shapes of params")
        if method == "attend":
            return attend_update(plan_product(self.spec, view), x, a, b, y.dtype)
        if equation is not None and self.layer.equation is not None:
            view = view_at_call(equation, self.layer.equation, self.layer.kernel_shape, self.path)
        in_stack = numbered_layer(factors["number"].reshape(())) if "number" in factors else contextlib.nullcontext()
        with in_stack:
            plan = plan_product(self.spec, view)
            return update(plan, x, a, b, plan.mask(x.shape, self.path), y.dtype)
