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

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from melora_jax.config import AdapterSpec, Init, Mixer, Strategy
from melora_jax.starts import orthogonal_factors

# The packed form does n times the arithmetic of the batched one, in one wide product instead of n narrow ones.
# Up to this many latents the width is worth it: measured on CPU; elsewhere one 128-wide matrix unit is assumed.
PACKED_LATENTS = {"cpu": 32}
PACKED_LATENTS_ELSEWHERE = 128
# Above this many latents W + ΔW is formed instead, where that can be done (`merged_product`). On 2 CPU cores a layer's
# passes over the base's alone (d = 384, 2,048 tokens), packed or batched against merged: n=8 r=1 1.30 : 1.31, n=32 r=1
# 1.46 : 1.35, n=8 r=8 1.72 : 1.38, n=32 r=8 2.02 : 1.44. Not measured elsewhere, and so not taken there.
MERGED_LATENTS = {"cpu": 16}
# Below this many tokens (generation) forming W + ΔW costs more than it saves.
MERGED_TOKENS = 256


def scale_of(spec: AdapterSpec) -> np.ndarray:
    """s_k for each latent, [n r] float32, zero where a mini's rank is below the widest.

    >>> scale_of(AdapterSpec(n=2, r=(1, 2), alpha=(3.0, 4.0))).tolist()
    [[3.0, 0.0], [2.0, 2.0]]
    """
    ranks = np.array(spec.r)[:, None]
    return np.where(np.arange(max(spec.r)) < ranks, np.array(spec.scales)[:, None], 0.0).astype(np.float32)


def start_key(key: Array, path: str) -> Array:
    """The key of a site's start values: its path folded in, so that they do not depend on the other sites."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def init_factors(
    key: Array, d_in: int, d_out: int, spec: AdapterSpec
) -> tuple[Float[Array, "n i r"], Float[Array, "n r o"]]:
    """Start values: A random, B zero, both float32.

    A is uniform within 1/sqrt(i), torch's kaiming_uniform(a=√5) over a slice, as the authors start it (and
    within 1/sqrt(d_in) for mixer `all`, where every latent reads the whole input); or Gaussian with deviation 1/r.
    With init `orthogonal` neither is zero, but A·B is.
    """
    i, o, r = d_in // spec.n, d_out // spec.n, max(spec.r)
    initialiser = _a_initialiser(spec.init, spec.mixer, spec.n, r)
    if spec.init == "orthogonal":
        return orthogonal_factors(key, i, o, spec)
    if spec.init == "pissa":
        raise ValueError("init='pissa' starts from a layer's kernel; put it on one with PiSSADense.wrap or adapt")
    used = scale_of(spec)[:, None, :] != 0
    a = jnp.where(used, initialiser(key, (spec.n, i, r), jnp.float32), 0.0)
    return a, jnp.zeros((spec.n, r, o), jnp.float32)


def _a_initialiser(init: Init, mixer: Mixer, n: int, r: int) -> jax.nn.initializers.Initializer:
    if init == "gaussian":
        return jax.nn.initializers.normal(1.0 / r)
    fan = n if mixer == "all" else 1  # how many slices feed one latent
    # batch_axis keeps n out of the fan; he_uniform would start 2.45 times larger.
    return jax.nn.initializers.variance_scaling(1.0 / (3.0 * fan), "fan_in", "uniform", batch_axis=0)


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


def choose_strategy(strategy: Strategy, latents: int, backend: str, mergeable: bool = False) -> Strategy:
    """The strategy that `"auto"` stands for on a backend (`jax.default_backend()`); others are returned as they are.

    Args:
      strategy: what was asked for.
      latents: n·r.
      backend: where it shall run.
      mergeable: whether W + ΔW can be formed at no loss.

    >>> choose_strategy("auto", 8, "cpu"), choose_strategy("auto", 64, "cpu"), choose_strategy("auto", 64, "cpu", True)
    ('packed', 'batched', 'merged')
    """
    if strategy != "auto":
        return strategy
    if mergeable and latents > MERGED_LATENTS.get(backend, latents):
        return "merged"
    return "packed" if latents <= PACKED_LATENTS.get(backend, PACKED_LATENTS_ELSEWHERE) else "batched"


def merging_pays(tokens: int, d_in: int, o: int, n: int) -> bool:
    """Whether forming the blocks of ΔW twice, for both passes, costs less than half of the two products that it saves.

    r·d_in·o multiplications each time, against tokens·r·(d_in + n·o).

    >>> merging_pays(2048, 384, 48, 8), merging_pays(2048, 4096, 4096, 1), merging_pays(1, 384, 48, 8)
    (True, False, False)
    """
    return tokens >= max(MERGED_TOKENS, 4 * d_in * o // (d_in + n * o))


def apply(
    x: Float[Array, "... d_in"],
    a: Float[Array, "n i r"],
    b: Float[Array, "n r o"],
    scale: Float[Array, "n r"] | Float[np.ndarray, "n r"],
    mixer: Mixer = "identity",
    strategy: Strategy = "batched",
) -> Float[Array, "... d_out"]:
    """The adapter's output x·ΔW, without forming ΔW.

    >>> one = jnp.ones((2, 1, 1))
    >>> apply(jnp.array([3.0, 5.0]), one, one, np.array([[1.0], [2.0]], np.float32)).tolist()
    [3.0, 10.0]
    """
    return expand(reduce(x, a, strategy, mixer), b, scale, mixer, strategy)


def reduce(
    x: Float[Array, "... d_in"], a: Float[Array, "n i r"], strategy: Strategy, mixer: Mixer = "identity"
) -> Float[Array, "... n r"]:
    """The latents of every mini, x_k·A_k."""
    n, i, r = a.shape
    if mixer == "scatter":
        x = x[..., feature_order(n * i, 0)]
    if strategy == "packed":
        return (x @ block_diagonal(a)).reshape(*x.shape[:-1], n, r)
    return jax.vmap(jnp.matmul, in_axes=(-2, 0), out_axes=-2)(x.reshape(*x.shape[:-1], n, i), a)


def look_up(
    ids: Int[Array, "*batch"], a: Float[Array, "n i r"], keep: Float[Array, "*batch"], mixer: Mixer = "identity"
) -> Float[Array, "*batch n r"]:
    """The latents of a one-hot input of width n·i that is given as indices (an embedding's), times `keep`."""
    n, i, r = a.shape
    ids = jnp.where(ids < 0, ids + n * i, ids)  # counted from the end, as the embedding itself takes them
    if mixer == "scatter":
        ids = jnp.take(jnp.asarray(np.argsort(feature_order(n * i, 0)), ids.dtype), ids)
    rows = jnp.take(a.reshape(n * i, r), ids, axis=0)
    hit = jax.nn.one_hot(ids // i, n, dtype=a.dtype) * keep[..., None]
    return hit[..., :, None] * rows[..., None, :]


def expand(
    z: Float[Array, "... n r"],
    b: Float[Array, "n r o"],
    scale: Float[Array, "n r"] | Float[np.ndarray, "n r"],
    mixer: Mixer,
    strategy: Strategy,
) -> Float[Array, "... d_out"]:
    """From latents to the output: concat_k( (M·s·z)_k·B_k )."""
    n, r, o = b.shape
    z = mix(z * jnp.asarray(scale, z.dtype), mixer)
    if strategy == "packed":
        y = z.reshape(*z.shape[:-2], n * r) @ block_diagonal(b)
    else:
        y = jax.vmap(jnp.matmul, in_axes=(-2, 0), out_axes=-2)(z, b)
        y = y.reshape(*y.shape[:-2], n * o)
    return y[..., np.argsort(feature_order(n * o, 1))] if mixer == "scatter" else y


def block_diagonal(blocks: Float[Array, "n p q"]) -> Float[Array, "np nq"]:
    """The blocks laid out along the diagonal of one zero-filled matrix."""
    n, p, q = blocks.shape
    on_diagonal = jnp.eye(n, dtype=bool)[:, None, :, None]
    return jnp.where(on_diagonal, blocks[:, :, None, :], 0).reshape(n * p, n * q)


def packed_factors(
    a: Float[Array, "n i r"], b: Float[Array, "n r o"], scale: Float[np.ndarray, "n r"], mixer: Mixer
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
    left, right = packed_factors(a.astype(jnp.float32), b.astype(jnp.float32), scale, mixer)
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
