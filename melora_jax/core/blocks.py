"""The mathematics of MELoRA on plain arrays. Nothing here knows of Flax.

Dim key, used in shapes, einsums and prose throughout the project::

    n  mini-adapters            i = d_in / n     o = d_out / n
    r  rank of one mini         R = n · r, all latents        ...  batch dimensions

Factors are stacked: `a` is [n i r] and `b` is [n r o]. With x_k the k-th slice of the input (MELoRA,
arXiv 2402.17263, equation 3, as the authors' code computes it)::

    y = concat_k( s_k · x_k A_k B_k )        ΔW = Â · diag(s) · M · B̂

where Â [d_in R] and B̂ [R d_out] are block-diagonal and M is a fixed mixer of the latents. `scale` is an
[n r] array of s_k; where the minis' ranks differ, the factors are padded to the widest and `scale` is zero in
the padding, so padded entries neither act nor learn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from melora_jax.config import AdapterSpec, Mixer


def scale_of(spec: AdapterSpec) -> np.ndarray:
    """s_k for each latent, [n r] float32, zero where a mini's rank is below the widest.

    >>> scale_of(AdapterSpec(n=2, r=(1, 2), alpha=(3.0, 4.0))).tolist()
    [[3.0, 0.0], [2.0, 2.0]]
    """
    ranks = np.array(spec.r)[:, None]
    return np.where(np.arange(max(spec.r)) < ranks, np.array(spec.scales)[:, None], 0.0).astype(np.float32)


def feature_order(size: int, side: int) -> np.ndarray:
    """The fixed random order in which mixer `scatter` deals the features of a width to the minis, int [size].

    Args:
      size: d_in, or d_out.
      side: 0 for a layer's input, 1 for its output, whose orders differ.
    """
    return np.random.default_rng((side, size)).permutation(size)


def mix(z: Shaped[Array, "... n r"], mixer: Mixer) -> Shaped[Array, "... n r"]:
    """M applied to the latents: `all` (every mini reads the sum), `shuffle` (block a, chunk j → j, a), else nothing."""
    if mixer in ("identity", "scatter"):
        return z
    if mixer == "all":
        return jnp.broadcast_to(z.sum(-2, keepdims=True), z.shape)
    *batch, n, r = z.shape
    return z.reshape(*batch, n, n, r // n).swapaxes(-3, -2).reshape(z.shape)


def block_diagonal(blocks: Float[Array, "n p q"]) -> Float[Array, "np nq"]:
    """The blocks laid out along the diagonal of one zero-filled matrix.

    >>> block_diagonal(jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])).tolist()
    [[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 4.0]]
    """
    n, p, q = blocks.shape
    block, column = (jax.lax.broadcasted_iota(jnp.int32, (n, p, n, q), axis) for axis in (0, 2))
    return jnp.where(block == column, blocks[:, :, None, :], 0).reshape(n * p, n * q)


def exact_product(left: Float[Array, "*n p r"], right: Float[Array, "*n r q"]) -> Float[Array, "*n p q"]:
    """left @ right, exact to the dtype's rounding on every device.

    >>> exact_product(jnp.array([[3.0, 5.0]]), jnp.array([[7.0], [11.0]])).tolist()
    [[76.0]]
    """
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def packed_factors(
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
    scale: Float[Array, "n r"] | Float[np.ndarray, "n r"],
    mixer: Mixer,
) -> tuple[Float[Array, "d_in R"], Float[Array, "R d_out"]]:
    """Plain LoRA factors of the same update: ΔW = left @ right.

    R is Σ over minis of the padded rank (left = Â, right = diag(s)·M·B̂), but for mixer `all`, whose
    update is a sum over minis, it is r (left stacks the s_k·A_k, right sets the B_k side by side).
    """
    if mixer == "all":
        n, i, r = a.shape
        left = (a * scale[:, None, :]).reshape(n * i, r)
        return left, b.swapaxes(0, 1).reshape(r, -1)
    n, r = scale.shape
    rows = mix(jnp.arange(n * r).reshape(n, r), mixer).reshape(-1)  # no matmul: an accelerator's may round
    left, right = block_diagonal(a), jnp.asarray(scale.reshape(-1, 1), b.dtype) * block_diagonal(b)[rows]
    if mixer == "scatter":
        orders = [np.argsort(feature_order(size, side)) for side, size in enumerate((len(left), right.shape[1]))]
        return left[orders[0]], right[:, orders[1]]
    return left, right


def delta(
    a: Float[Array, "n i r"], b: Float[Array, "n r o"], scale: Float[np.ndarray, "n r"], mixer: Mixer = "identity"
) -> Float[Array, "d_in d_out"]:
    """ΔW in float32, at the highest matmul precision: what `merge` adds to the kernel."""
    return exact_product(*packed_factors(a.astype(jnp.float32), b.astype(jnp.float32), scale, mixer))
