"""What an adapter adds to its layer: to the output, in the output's own layout, and to the kernel.

The arithmetic of a site, whatever framework the layer comes from: arrays, their flat view, and the site's settings.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from melora_jax.config import AdapterSpec, Strategy
from melora_jax.core import blocks
from melora_jax.core.dense_view import DenseView
from melora_jax.core.dropout import adapter_rate, dropout
from melora_jax.core.products.xla_cpu import whole_sum


class Adapter(Protocol):
    """The settings of one site: its spec, the strategy chosen for it, and the path that names its dropout stream."""

    @property
    def spec(self) -> AdapterSpec: ...
    @property
    def strategy(self) -> Strategy: ...
    @property
    def path(self) -> str: ...


def update_of(
    adapter: Adapter,
    view: DenseView,
    x: Array,
    y: Array,
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
) -> Array:
    """concat_k( s_k · drop(x_k)·A_k·B_k ), of the shape and dtype of `y`.

    Args:
      adapter: the site's settings.
      view: how input, output and kernel lie flat.
      x, y: the layer's input and output.
      a, b: the factors.
    """
    latents = _latents_of(adapter, view, x, in_dtype_of(adapter, a, y))
    return _Writer(adapter.spec, adapter.strategy, view).update(y, latents, in_dtype_of(adapter, b, y))


def output_with_update(
    adapter: Adapter, view: DenseView, x: Array, y: Array, a: Float[Array, "n i r"], b: Float[Array, "n r o"]
) -> Array:
    """y + update_of(...), kept as one array (`whole_sum`)."""
    latents = _latents_of(adapter, view, x, in_dtype_of(adapter, a, y))
    writer = _Writer(adapter.spec, adapter.strategy, view)
    return whole_sum(writer, y, latents, in_dtype_of(adapter, b, y))


def _latents_of(adapter: Adapter, view: DenseView, x: Array, a: Float[Array, "n i r"]) -> Float[Array, "... n r"]:
    """drop(x_k)·A_k of every mini."""
    rate = adapter_rate(adapter.spec.dropout)
    if view.lookup:  # an embedding's dropout drops whole tokens
        keep = dropout(jnp.ones(x.shape, a.dtype), rate, adapter.path)
        return blocks.look_up(x, a, keep, adapter.spec.mixer)
    flat = dropout(view.flatten_input(x).astype(a.dtype), rate, adapter.path)
    return blocks.reduce(flat, a, adapter.strategy, adapter.spec.mixer)


@dataclasses.dataclass(frozen=True)
class _Writer:
    """From latents to the layer's output. Layers of equal settings have equal ones, and so one program."""

    spec: AdapterSpec
    strategy: Strategy
    view: DenseView

    def update(self, y: Array, latents: Float[Array, "... n r"], b: Float[Array, "n r o"]) -> Array:
        scale = blocks.scale_of(self.spec)
        flat = blocks.expand(latents, b, scale, self.spec.mixer, self.strategy)
        return self.view.unflatten_output(flat).astype(y.dtype)

    def __call__(self, y: Array, latents: Float[Array, "... n r"], b: Float[Array, "n r o"]) -> Array:
        return y + self.update(y, latents, b)


def attend_update(
    adapter: Adapter, view: DenseView, query: Array, y: Array, a: Float[Array, "n i r"], b: Float[Array, "n r o"]
) -> Array:
    """query·ΔEᵀ, of the shape and dtype of `y`: an adapted embedding `[..., features]` as output layer.

    The adapter's dropout is of the embedding's own input, so there is none here.
    """
    a, b = in_dtype_of(adapter, a, y), in_dtype_of(adapter, b, y)
    row = jax.ShapeDtypeStruct((*query.shape[:-1], view.d_in), a.dtype)

    def forward(x: Array) -> Array:
        return blocks.apply(x, a, b, blocks.scale_of(adapter.spec), adapter.spec.mixer)

    (update,) = jax.linear_transpose(forward, row)(query.astype(a.dtype))
    return update.astype(y.dtype)


def merged_kernel(
    spec: AdapterSpec, view: DenseView, kernel: Array, a: Float[Array, "n i r"], b: Float[Array, "n r o"]
) -> Array:
    """W + ΔW in the kernel's layout and dtype, summed in float32 at least."""
    delta = blocks.delta(a, b, blocks.scale_of(spec), spec.mixer)
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    return (kernel.astype(wide) + view.unflatten_kernel(delta, kernel.shape)).astype(kernel.dtype)


def in_dtype_of(adapter: Adapter, factor: Array, y: Array | jax.ShapeDtypeStruct) -> Array:
    """A factor in the dtype of the computation: the adapter's own, or that of its layer's output."""
    return factor.astype(jnp.dtype(adapter.spec.dtype or y.dtype))
