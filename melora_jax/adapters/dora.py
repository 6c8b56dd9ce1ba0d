"""`DoRADense`: an adapter turns the weights of each output, and a vector sets their norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import MELoRAParam
from melora_jax.config import AdapterSpec
from melora_jax.core.dense_view import DenseView, unadaptable
from melora_jax.core.initializers import from_kernel
from melora_jax.core.products.latents import update
from melora_jax.nn.layer_view import refuse_mesh
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.sharding import active_mesh

_ADAPTABLE = (nnx.Linear, nnx.LinearGeneral, QuantizedLinear)


class DoRADense(MELoRADense):
    """A frozen dense layer whose weights are split into magnitude and direction; n minis adapt the direction.

        y = x·(W + ΔW)·diag(g) + bias,    g = m / ‖W + ΔW‖ over d_in,    ΔW = blockdiag( s_k·A_k·B_k )

    m `[d_out]`, float32, starts at ‖W‖, so that g = 1. The norm counts as a constant in the backward pass (section 4.3
    of the paper, as in PEFT). Dropout acts on the adapter's input only; PEFT also drops what (g - 1) multiplies, so the
    two differ with dropout > 0. With n=1 it is PEFT's `use_dora`.

    Source: DoRA (arXiv 2402.09353), equation 5.

    Args and Raises: as `MELoRADense`; `wrap` refuses an Embed, an Einsum, and a layer on a mesh too.

    >>> layer = DoRADense(8, 12, n=4, r=1, rngs=nnx.Rngs(0))
    >>> layer.magnitude.shape
    (12,)
    """

    kind = "dora"
    variant = "dora"
    setting = "variant='dora'"
    mergeable = False
    one_device = True
    low_rank = False
    peft_settings: ClassVar[Mapping[str, bool]] = {"use_dora": True}
    peft_tensors: ClassVar[Mapping[str, str]] = {"magnitude": "lora_magnitude_vector"}

    @classmethod
    def shapes(cls, spec: AdapterSpec, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Those of MELoRA, and the norms."""
        return super().shapes(spec, d_in, d_out) | {"magnitude": (d_out,)}

    @classmethod
    def parameters(cls, spec: AdapterSpec, d_in: int, d_out: int) -> int:
        """Those of MELoRA and d_out norms."""
        return super().parameters(spec, d_in, d_out) + d_out

    def _start(self, key: jax.Array, d_in: int, d_out: int) -> tuple[jax.Array, jax.Array]:
        view, quantized = self.view, isinstance(self.base, QuantizedLinear)
        kernel = self.base.kernel if quantized else self.kernel_variable.get_raw_value()
        self.magnitude = MELoRAParam(from_kernel(lambda kernel: _norms(view.flatten_kernel(kernel)), kernel))
        return super()._start(key, d_in, d_out)

    @classmethod
    def checked(cls, layer: nnx.Module, spec: AdapterSpec, path: str) -> DenseView:
        """As `MELoRADense.checked`; an embedding, an einsum, or a layer on a mesh is refused too."""
        view = super().checked(layer, spec, path)
        if not isinstance(layer, _ADAPTABLE):
            kind = type(layer).__name__
            raise unadaptable(path, f"{cls.setting} scales the outputs of a Linear or LinearGeneral, not of {kind}")
        if not isinstance(layer, QuantizedLinear):
            refuse_mesh(getattr(layer, view.kernel_name), cls.setting, path)
        return view

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output with its adapter; further arguments go to the base layer."""
        if not self.enabled:
            return self.base(x, *args, **kwargs)
        if active_mesh() is not None:
            raise ValueError(
                f"{self.setting} at {self.path} does not run on a mesh; take a plain adapter, or one device"
            )
        plan, y = self.plan_for(x.shape), self.base(x, *args, **kwargs)
        direction = update(plan, x, *self.factors(), plan.mask(x.shape, self.path), y.dtype)
        gain = self.gain().reshape(plan.view.out_shape)
        bias = 0 if self.base.bias is None else self.base.bias[...].astype(y.dtype)
        # In this form the output is exactly the base's where g is 1.
        return y + (gain - 1).astype(y.dtype) * (y - bias) + gain.astype(y.dtype) * direction

    def gain(self) -> Float[Array, " d_out"]:
        """g = m / ‖W + ΔW‖, float32; gradients reach m alone."""
        return self.magnitude[...] / jax.lax.stop_gradient(_norms(self._direction()))

    def _direction(self) -> Float[Array, "d_in d_out"]:
        """W + ΔW, flat, float32."""
        kernel = getattr(self.base, self.view.kernel_name)[...]
        return self.view.flatten_kernel(kernel).astype(jnp.float32) + super().delta()

    def delta(self) -> jax.Array:
        """What training changed, (W + ΔW)·diag(g) - W, as a flat `[d_in, d_out]` array in float32 of any rank."""
        kernel = getattr(self.base, self.view.kernel_name)[...]
        return self._direction() * self.gain() - self.view.flatten_kernel(kernel).astype(jnp.float32)

    def merged(self) -> jax.Array:
        """(W + ΔW)·diag(g) in the base kernel's layout and dtype, computed in float32."""
        kernel = getattr(self.base, self.view.kernel_name)[...]
        return self.view.unflatten_kernel(self._direction() * self.gain(), kernel.shape).astype(kernel.dtype)


def _norms(kernel: Float[Array, "d_in d_out"]) -> Float[Array, " d_out"]:
    """The norm of each output's weights, float32."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=0)
