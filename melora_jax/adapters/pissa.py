"""`PiSSADense`: an adapter that starts at the principal part of its kernel's diagonal blocks."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import StartParam
from melora_jax.config import AdapterSpec
from melora_jax.core.dense_view import DenseView, unadaptable
from melora_jax.core.initializers import difference, difference_spec, from_kernel, principal_factors
from melora_jax.nn.layer_view import refuse_mesh
from melora_jax.nn.quantized import QuantizedLinear


class PiSSADense(MELoRADense):
    """MELoRA that starts at the principal singular directions of each diagonal block of W.

        y = x·W + bias + concat_k( s_k · x_k·(A_k·B_k - A_k0·B_k0) ),    s_k·A_k0·B_k0 = best rank-r_k part of W_kk

    This is PiSSA's x·(W - s·A_0·B_0) + s·x·A·B, with the same gradients, and leaves the base bit for bit as it was.
    With n=1 it is PEFT's `init_lora_weights="pissa"`. `a_start` `[n i r]` and `b_start` `[n r o]`, float32, are saved
    with the adapter; as plain LoRA it has rank 2·Σ r_k.

    Source: PiSSA (arXiv 2404.02948), section 3.

    Args and Raises: as `MELoRADense`, with `init="pissa"`; a rank above the smaller side of a block is refused, and by
    `wrap` a layer that is quantised or on a mesh.

    >>> layer = PiSSADense(8, 12, n=4, r=2, init="pissa", rngs=nnx.Rngs(0))
    >>> layer.a_start.shape, layer.packed_factors()[0].shape
    ((4, 2, 2), (8, 16))
    """

    kind = "pissa"
    setting = "init='pissa'"
    mergeable = False
    one_device = True
    alpha_varies = False  # the start has its own

    @classmethod
    def shapes(cls, spec: AdapterSpec, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Those of MELoRA, and the start values of both factors."""
        factors = super().shapes(spec, d_in, d_out)
        return factors | {f"{name}_start": shape for name, shape in factors.items()}

    @classmethod
    def product_spec(cls, spec: AdapterSpec) -> AdapterSpec:
        """The difference from the start, as a plain adapter of twice the ranks."""
        return difference_spec(spec)

    @classmethod
    def plain(cls, spec: AdapterSpec, arrays: Mapping[str, np.ndarray]) -> tuple[AdapterSpec, np.ndarray, np.ndarray]:
        """The difference from the start, at twice the ranks."""
        a, b = difference(*(jnp.asarray(arrays[name]) for name in ("a", "b", "a_start", "b_start")))
        return difference_spec(spec), np.asarray(a), np.asarray(b)

    @classmethod
    def checked(cls, layer: nnx.Module, spec: AdapterSpec, path: str) -> DenseView:
        """As `MELoRADense.checked`; a quantised layer, or one on a mesh, is refused too."""
        view = super().checked(layer, spec, path)
        if isinstance(layer, QuantizedLinear):
            raise unadaptable(path, f"{cls.setting} splits a kernel, and this one is quantised to {layer.qtype}")
        refuse_mesh(getattr(layer, view.kernel_name), cls.setting, path)
        return view

    def _start(self, key: jax.Array, d_in: int, d_out: int) -> tuple[jax.Array, jax.Array]:
        view, kernel = self.view, self.kernel_variable.get_raw_value()
        try:
            start = from_kernel(lambda kernel: principal_factors(view.flatten_kernel(kernel), self.spec), kernel)
        except ValueError as error:
            raise ValueError(f"{error} (at {self.path})" if self.path else str(error)) from None
        self.a_start, self.b_start = map(StartParam, start)
        # Copies, since a step that donates the factors must not delete their start.
        return from_kernel(jnp.copy, start[0]), from_kernel(jnp.copy, start[1])

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Factors of A·B - A_0·B_0, `[n i 2r]` and `[n 2r o]`."""
        return difference(self.a[...], self.b[...], self.a_start[...], self.b_start[...])
