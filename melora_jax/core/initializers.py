"""Start values of both factors: A random and B zero, both orthogonal with A·B = 0, or those of PiSSA.

PiSSA starts A_0·B_0 at the principal part of the kernel and lets the base keep the rest, W - s·A_0·B_0. The same
function, with the same gradients, is the untouched base plus the difference s·(A·B - A_0·B_0), so that is what is
computed here: the base stays as it is bit for bit, which may be tied, shared or unwrapped, and the difference is a LoRA
of twice the rank, which every program reads.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from melora_jax.config import AdapterSpec
from melora_jax.core.blocks import scale_of


def from_kernel(function: Callable[[Array], Any], kernel: Any) -> Any:
    """What `function` makes of a kernel: of an abstract one, shapes and dtypes alone."""
    return jax.eval_shape(function, kernel) if isinstance(kernel, jax.ShapeDtypeStruct) else function(kernel)


def start_key(key: Array, path: str) -> Array:
    """The key of a site's start values: its path folded in, so that they do not depend on the other sites."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def init_factors(
    key: Array, d_in: int, d_out: int, spec: AdapterSpec
) -> tuple[Float[Array, "n i r"], Float[Array, "n r o"]]:
    """Start values that need no kernel, float32: A random and B zero, or with init `orthogonal` A·B = 0.

    A is uniform within 1/sqrt(i), torch's kaiming_uniform(a=√5) over a slice, as the authors start it (and
    within 1/sqrt(d_in) for mixer `all`, where every latent reads the whole input); or Gaussian with deviation 1/r.

    Raises:
      ValueError: init `pissa`, whose start values are made from a kernel.
    """
    if spec.init not in _STARTS:
        remedy = "put it on one with PiSSADense.wrap or adapt"
        raise ValueError(f"init={spec.init!r} starts from a layer's kernel; {remedy}")
    return _STARTS[spec.init](key, d_in // spec.n, d_out // spec.n, spec)


def _kaiming(key: Array, i: int, o: int, spec: AdapterSpec) -> tuple[Array, Array]:
    fan = spec.n if spec.mixer == "all" else 1  # how many slices feed one latent
    # batch_axis keeps n out of the fan; he_uniform would start 2.45 times larger.
    initialiser = jax.nn.initializers.variance_scaling(1.0 / (3.0 * fan), "fan_in", "uniform", batch_axis=0)
    return _random_a(initialiser, key, i, o, spec)


def _gaussian(key: Array, i: int, o: int, spec: AdapterSpec) -> tuple[Array, Array]:
    return _random_a(jax.nn.initializers.normal(1.0 / max(spec.r)), key, i, o, spec)


def _random_a(
    initialiser: jax.nn.initializers.Initializer, key: Array, i: int, o: int, spec: AdapterSpec
) -> tuple[Array, Array]:
    """A random where a latent is used and zero in the padding, and B zero."""
    n, r = spec.n, max(spec.r)
    used = scale_of(spec)[:, None, :] != 0
    return jnp.where(used, initialiser(key, (n, i, r), jnp.float32), 0.0), jnp.zeros((n, r, o), jnp.float32)


def orthogonal_factors(
    key: Array, i: int, o: int, spec: AdapterSpec
) -> tuple[Float[Array, "n i r"], Float[Array, "n r o"]]:
    """A and B of every mini with A_k·B_k = 0 to rounding: they use the odd and the even rows of one orthogonal matrix.

        A_k = X·Q_odd / 10,  B_k = Q_evenᵀ·Y / 10        X [i r/2], Y [r/2 o] Gaussian, Q [r r] orthogonal

    Source: PEFT's `init_lora_weights="orthogonal"`, mini by mini.
    """
    r = spec.r[0]

    def one(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, 3)
        q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (r, r)))
        a = jax.random.normal(keys[1], (i, r // 2)) @ q[0::2] / 10
        return a, q[1::2].T @ jax.random.normal(keys[2], (r // 2, o)) / 10

    return jax.vmap(one)(jax.random.split(key, spec.n))


_STARTS = {"kaiming": _kaiming, "gaussian": _gaussian, "orthogonal": orthogonal_factors}


def principal_factors(
    kernel: Float[Array, "d_in d_out"], spec: AdapterSpec
) -> tuple[Float[Array, "n i r"], Float[Array, "n r o"]]:
    """A and B with s_k·A_k·B_k = the best rank-r_k approximation of the k-th diagonal block, float32.

        A_k = U_r·sqrt(Σ_r / s_k),  B_k = sqrt(Σ_r / s_k)·V_rᵀ        of  W_kk = U·Σ·Vᵀ

    Source: PiSSA (arXiv 2404.02948, section 3), for n=1.

    Raises:
      ValueError: a rank above the smaller side of a block.
    """
    n, widest = spec.n, max(spec.r)
    i, o = kernel.shape[0] // n, kernel.shape[1] // n
    if widest > min(i, o):
        raise ValueError(f"init='pissa' finds {min(i, o)} directions in a block [{i}, {o}], not r={widest}; lower r")
    each = np.arange(n)
    diagonal = kernel.astype(jnp.float32).reshape(n, i, n, o)[each, :, each]
    u, values, vt = jnp.linalg.svd(diagonal, full_matrices=False)
    scales = np.array(spec.scales, np.float32)[:, None]
    used = np.arange(widest) < np.array(spec.r)[:, None]
    root = jnp.sqrt(values[:, :widest] / scales) * used
    return u[:, :, :widest] * root[:, None, :], root[:, :, None] * vt[:, :widest]


def difference_spec(spec: AdapterSpec) -> AdapterSpec:
    """The plain adapter of twice the ranks, at the same scales, that `difference` gives the factors of.

    >>> difference_spec(AdapterSpec(n=1, r=(3,), alpha=(6.0,), init="pissa")).scales
    (2.0,)
    """
    alpha = tuple(scale * 2 * r for scale, r in zip(spec.scales, spec.r, strict=True))
    return dataclasses.replace(spec, r=tuple(2 * r for r in spec.r), alpha=alpha, scaling="mini", init="kaiming")


def difference(
    a: Float[Array, "n i r"], b: Float[Array, "n r o"], a_start: Float[Array, "n i r"], b_start: Float[Array, "n r o"]
) -> tuple[Float[Array, "n i 2r"], Float[Array, "n 2r o"]]:
    """Factors of A·B - A_0·B_0, mini by mini: each latent beside its start, so that padding stays last."""
    n, i, r = a.shape
    wide = jnp.stack([a, a_start], -1).reshape(n, i, 2 * r)
    return wide, jnp.stack([b, -b_start], 2).reshape(n, 2 * r, b.shape[2])
