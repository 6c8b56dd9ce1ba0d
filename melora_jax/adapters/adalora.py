"""`AdaLoRADense`: each latent has a factor, which a `RankBudget` sets to zero by importance; and its penalty."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import MELoRAParam
from melora_jax.config import AdapterSpec
from melora_jax.core.dense_view import DenseView
from melora_jax.nn.layer_view import refuse_mesh
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.tree import walk

DEVIATION = 0.02  # of the start of A and B, as in the authors' code and PEFT


class AdaLoRADense(MELoRADense):
    """A frozen dense layer plus n mini-adapters in the form of a singular value decomposition.

        y = x·W + bias + concat_k( s_k · drop(x_k)·A_k·diag(e_k)·B_k ),    s_k = alpha_k / r_k

    `e` `[n r]` starts at zero, A and B Gaussian with deviation 0.02. `orthogonality`, added to the loss, keeps A and
    B near orthogonal; a `RankBudget` in `make_optimizer` sets the least important entries of e to zero. r is the rank
    at the start. With n=1 it is PEFT's AdaLoRA, except for the 1e-5 that PEFT adds to r in the scale.

    Source: AdaLoRA (arXiv 2303.10512), section 3.1.

    Args and Raises: as `MELoRADense`. Output and arrays have the shapes and dtypes given there; e is float32.

    >>> layer = AdaLoRADense(8, 12, n=4, r=2, rngs=nnx.Rngs(0))
    >>> layer.e.shape
    (4, 2)
    """

    kind = "adalora"
    variant = "adalora"
    setting = "variant='adalora'"
    mergeable = False
    one_device = True
    alpha_varies = False  # the penalty on A and B does not scale with it
    has_budget = True

    @classmethod
    def shapes(cls, spec: AdapterSpec, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """Those of MELoRA, and the factor of each latent."""
        return super().shapes(spec, d_in, d_out) | {"e": (spec.n, max(spec.r))}

    @classmethod
    def parameters(cls, spec: AdapterSpec, d_in: int, d_out: int) -> int:
        """Those of MELoRA and a factor a latent."""
        return super().parameters(spec, d_in, d_out) + spec.latents

    @classmethod
    def plain(cls, spec: AdapterSpec, arrays: Mapping[str, np.ndarray]) -> tuple[AdapterSpec, np.ndarray, np.ndarray]:
        """The latents whose factor is not zero, it multiplied into A; a mini that has none left keeps one of zeros."""
        a, b, e = arrays["a"], arrays["b"], arrays["e"]
        kept = [np.flatnonzero(row) if row.any() else np.array([0]) for row in e]
        r = tuple(len(latents) for latents in kept)
        left = np.zeros((*a.shape[:2], max(r)), np.float32)
        right = np.zeros((spec.n, max(r), b.shape[2]), np.float32)
        for k, latents in enumerate(kept):
            left[k, :, : len(latents)] = a[k][:, latents] * e[k, latents]
            right[k, : len(latents)] = b[k, latents]
        alpha = tuple(scale * rank for scale, rank in zip(spec.scales, r, strict=True))  # the scale stays the start's
        return dataclasses.replace(spec, r=r, alpha=alpha, scaling="mini", variant="plain"), left, right

    @classmethod
    def checked(cls, layer: nnx.Module, spec: AdapterSpec, path: str) -> DenseView:
        """As `MELoRADense.checked`; a layer on a mesh is refused too."""
        view = super().checked(layer, spec, path)
        if not isinstance(layer, QuantizedLinear):
            refuse_mesh(getattr(layer, view.kernel_name), cls.setting, path)
        return view

    def _start(self, key: jax.Array, d_in: int, d_out: int) -> tuple[jax.Array, jax.Array]:
        n, r = self.spec.n, max(self.spec.r)
        self.e = MELoRAParam(jnp.zeros((n, r), jnp.float32))
        keys, shapes = jax.random.split(key), ((n, d_in // n, r), (n, r, d_out // n))
        a, b = (DEVIATION * jax.random.normal(one, shape) for one, shape in zip(keys, shapes, strict=True))
        return a, b

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A·diag(e) and B, `[n i r]` and `[n r o]`."""
        return self.a[...] * self.e[...][:, None, :], self.b[...]


def orthogonality(model: nnx.Module) -> Float[Array, ""]:
    """How far the factors of AdaLoRA are from orthogonal, to be added to the loss (times 0.5 in AdaLoRA and PEFT).

        mean over all A_k and B_k of ‖A_kᵀ·A_k - I‖_F and ‖B_k·B_kᵀ - I‖_F

    Source: AdaLoRA (arXiv 2303.10512), equation 4, as PEFT computes it: not squared, and the mean.

    Args:
      model: an adapted model, whose layers may be stacked.

    Returns:
      A float32 scalar, at least 0.

    Raises:
      ValueError: the model has no AdaLoRA layer.

    >>> layer = AdaLoRADense(4, 6, n=2, r=1, rngs=nnx.Rngs(0))
    >>> layer.a[...], layer.b[...] = jnp.ones((2, 2, 1)), jnp.full((2, 1, 3), 3**-0.5)
    >>> print(orthogonality(layer))
    0.5
    """
    layers: dict[int, Any] = {id(node): node for _, node in walk(model) if isinstance(node, AdaLoRADense)}
    if not layers:
        raise ValueError('the model has no AdaLoRA layer; adapt it with variant="adalora"')
    found = [_distances(layer.a[...].swapaxes(-1, -2)) for layer in layers.values()]
    found += [_distances(layer.b[...]) for layer in layers.values()]
    return jnp.concatenate([distances.ravel() for distances in found]).mean()


def _distances(rows: Float[Array, "*stack r d"]) -> Float[Array, "*stack"]:
    """‖P·Pᵀ - I‖_F of each matrix."""
    squared = jnp.square(rows @ rows.swapaxes(-1, -2) - jnp.eye(rows.shape[-2], dtype=rows.dtype)).sum((-1, -2))
    positive = squared > 0  # at an exactly orthogonal matrix the root has no gradient: take 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)
