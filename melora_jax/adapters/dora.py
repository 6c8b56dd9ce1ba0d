"""`DoRADense`: the direction of each output's weights by an adapter, their norm by a vector of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import MELoRAParam
from melora_jax.config import AdapterSpec
from melora_jax.core.adapter_update import update_of
from melora_jax.core.dense_view import DenseView, unadaptable
from melora_jax.core.initializers import from_kernel
from melora_jax.nn.layer_view import refuse_mesh
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.sharding import active_mesh

_ADAPTABLE = (nnx.Linear, nnx.LinearGeneral, QuantizedLinear)


class DoRADense(MELoRADense):
    """A frozen dense layer whose weights are decomposed in magnitude and direction, the direction with n minis.

        y = x·(W + ΔW)·diag(g) + bias,    g = m / ‖W + ΔW‖ over d_in,    ΔW = blockdiag( s_k·A_k·B_k )

    m `[d_out]` starts at ‖W‖, so that g = 1. The norm is taken as a constant in the backward pass (section 4.3 of the
    paper, as in PEFT). Dropout is of the adapter's input alone; PEFT drops also what (g - 1) multiplies, so with
    dropout above 0 the two differ. For n=1 it is PEFT's `use_dora`.

    Source: DoRA (arXiv 2402.09353), equation 5.

    Args and Raises: as `MELoRADense`; an Embed, an Einsum or a mesh are refused too.

    >>> layer = DoRADense(8, 12, n=4, r=1, rngs=nnx.Rngs(0))
    >>> layer.magnitude.shape
    (12,)
    """

    variant = "dora"
    extras = ("magnitude",)

    def __init__(self, d_in: int, d_out: int, **settings: Any) -> None:
        super().__init__(d_in, d_out, **settings)
        view = self.checked(self.base, self.spec, self.path or type(self).__name__)
        quantized = isinstance(self.base, QuantizedLinear)
        kernel = self.base.kernel if quantized else self.kernel_variable.get_raw_value()
        self.magnitude = MELoRAParam(from_kernel(lambda kernel: _norms(view.flatten_kernel(kernel)), kernel))

    @classmethod
    def checked(cls, layer: nnx.Module, spec: AdapterSpec, path: str) -> DenseView:
        """As `MELoRADense.checked`; an embedding, an einsum, or a layer on a mesh is refused too."""
        view = super().checked(layer, spec, path)
        if not isinstance(layer, _ADAPTABLE):
            kind = type(layer).__name__
            raise unadaptable(path, f"variant='dora' scales the outputs of a Linear or LinearGeneral, not of {kind}")
        if not isinstance(layer, QuantizedLinear):
            refuse_mesh(getattr(layer, view.kernel_name), "variant='dora'", path)
        return view

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output with its adapter; further arguments go to the base layer."""
        if active_mesh() is not None:
            raise ValueError(
                f"variant='dora' at {self.path} does not run on a mesh; take a plain adapter, or one device"
            )
        y, view = self.base(x, *args, **kwargs), self.view
        update = update_of(self, view, x, y, *self.factors())
        gain = self.gain().reshape(view.out_shape)
        bias = 0 if self.base.bias is None else self.base.bias[...].astype(y.dtype)
        # so that the output is the base's own where g is 1
        return y + (gain - 1).astype(y.dtype) * (y - bias) + gain.astype(y.dtype) * update

    def gain(self) -> Float[Array, " d_out"]:
        """g = m / ‖W + ΔW‖, float32; gradients reach m alone."""
        return self.magnitude[...] / jax.lax.stop_gradient(_norms(self._direction()))

    def _direction(self) -> Float[Array, "d_in d_out"]:
        """W + ΔW, flat, float32."""
        kernel = getattr(self.base, self.view.kernel_name)[...]
        return self.view.flatten_kernel(kernel).astype(jnp.float32) + super().delta()

    def delta(self) -> jax.Array:
        """What training changed, (W + ΔW)·diag(g) - W, as a flat `[d_in, d_out]` array in float32; of no low rank."""
        kernel = getattr(self.base, self.view.kernel_name)[...]
        return self._direction() * self.gain() - self.view.flatten_kernel(kernel).astype(jnp.float32)

    def merged(self) -> jax.Array:
        """(W + ΔW)·diag(g) in the base kernel's layout and dtype, computed in float32."""
        kernel = getattr(self.base, self.view.kernel_name)[...]
        return self.view.unflatten_kernel(self._direction() * self.gain(), kernel.shape).astype(kernel.dtype)


def _norms(kernel: Float[Array, "d_in d_out"]) -> Float[Array, " d_out"]:
    """The norm of each output's weights, float32."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=0)
