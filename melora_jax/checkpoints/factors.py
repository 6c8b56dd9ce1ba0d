"""Adapters as plain LoRA factors, ΔW = left · right, and their exact inverse.

AdaLoRA and PiSSA first become the plain MELoRA that they compute; DoRA has no such form.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import zlib

import jax.numpy as jnp
import numpy as np

from melora_jax.adapters.kinds import kind_of
from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors, config_of_sites
from melora_jax.config import AdapterSpec
from melora_jax.core import blocks


def as_plain(tree: AdapterTree, why: str) -> AdapterTree:
    """The adapter with every site in plain factors; the tree itself where all are.

    Args:
      tree: the adapter.
      why: who needs them plain, for the message.

    Raises:
      ValueError: a site is DoRA's, whose update has no low rank.
    """
    for path, site in tree.sites.items():
        if not kind_of(site.spec).low_rank:
            raise ValueError(f"{path} is DoRA's, and {why}; merge the model instead, DoRA's update has no low rank")
    sites = {path: plain_site(site) for path, site in tree.sites.items()}
    if all(sites[path] is site for path, site in tree.sites.items()):
        return tree
    specs = {path: site.spec for path, site in sites.items()}
    config = config_of_sites(specs, tree.config.modules_to_save, tree.config.bias)
    return dataclasses.replace(tree, config=config, sites=sites)


def plain_site(site: SiteFactors) -> SiteFactors:
    """A site of AdaLoRA or PiSSA in plain factors; others as they are."""
    spec, a, b = kind_of(site.spec).plain(site.spec, {"a": site.a, "b": site.b, **site.extras})
    return site if spec is site.spec else SiteFactors(spec, a, b, site.lookup)


def plain_factors(site: SiteFactors, *, scaled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """left [d_in, rank] and right [rank, d_out], float32, without the padding of narrower minis.

    Args:
      site: the adapter.
      scaled: whether the scales s_k are multiplied in: into right, or for mixer `all` into left.
    """
    scale = blocks.scale_of(site.spec)
    factor = scale if scaled else (scale != 0).astype(np.float32)
    a, b = jnp.asarray(site.a), jnp.asarray(site.b)
    left, right = map(np.asarray, blocks.packed_factors(a, b, factor, site.spec.mixer))
    if len(set(site.spec.r)) == 1:
        return left, right
    used = scale.reshape(-1) != 0  # only identity allows mixed ranks
    return left[:, used], right[used]


def factors_from_plain(
    spec: AdapterSpec, left: np.ndarray, right: np.ndarray, *, scaled: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """a [n i r] and b [n r o] from their plain factors; the inverse of `plain_factors` but for rounding by the scales.

    Entries of left and right that `plain_factors` leaves zero are ignored.

    Args:
      spec: the adapter that the factors are of.
      left: [d_in, rank].
      right: [rank, d_out].
      scaled: whether they include the scales.
    """
    n, r = spec.n, max(spec.r)
    scale = blocks.scale_of(spec)
    if spec.mixer == "scatter":
        left, right = left[blocks.feature_order(len(left), 0)], right[:, blocks.feature_order(right.shape[1], 1)]
    divisor = np.where(scale == 0, 1, scale) if scaled else np.ones_like(scale)
    if spec.mixer == "all":
        a = left.reshape(n, -1, r) / divisor[:, None, :]
        return a, np.ascontiguousarray(right.reshape(r, n, -1).swapaxes(0, 1))
    used = scale.reshape(-1) != 0
    wide, tall = np.zeros((len(left), n * r), left.dtype), np.zeros((n * r, right.shape[1]), right.dtype)
    wide[:, used], tall[used] = left, right
    tall = tall / divisor.reshape(-1, 1)
    rows = np.asarray(blocks.mix(jnp.arange(n * r).reshape(n, r), spec.mixer)).reshape(-1)
    each = np.arange(n)
    a = wide.reshape(n, -1, n, r)[each, :, each]
    b = tall[np.argsort(rows)].reshape(n, r, n, -1)[each, :, each]
    return a, b


def latents_of_minis(left: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
    """The latents of each mini, if left and right are block-diagonal: those of the most minis that fit them exactly.

    A latent belongs to the one slice of the input, and of the output, outside which it is zero. Latents that are all
    zero, as padding is, are left out. Factors that are not block-diagonal are one mini of all latents.

    Args:
      left: [d_in, R].
      right: [R, d_out].

    >>> left, right = np.repeat(np.eye(2), 3, axis=0), np.repeat(np.eye(2), 2, axis=1)
    >>> [latents.tolist() for latents in latents_of_minis(left, right)]
    [[0], [1]]
    """
    count = left.shape[1]
    common = math.gcd(len(left), right.shape[1])
    for n in range(min(count, common), 1, -1):
        if common % n == 0:
            read = (left.reshape(n, -1, count) != 0).any(1)
            written = (right.reshape(count, n, -1) != 0).any(2).T
            used = read | written
            if used.sum(0).max() <= 1 and used.any(1).all():
                return [np.flatnonzero(mini) for mini in used]
    live = np.flatnonzero(left.any(0) | right.any(1))
    return [live if live.size else np.arange(count)]


def rounding_of(site: SiteFactors, left: np.ndarray, right: np.ndarray) -> str:
    """What `restored` needs beside the scaled plain factors to give a site's factors bit for bit, as text."""
    guess = factors_from_plain(site.spec, left, right)[_scaled_one(site.spec)]
    exact = (site.a, site.b)[_scaled_one(site.spec)]
    bits = _bits(np.asarray(exact, np.float32)) ^ _bits(guess)
    return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode("ascii")


def restored(spec: AdapterSpec, left: np.ndarray, right: np.ndarray, rounding: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors whose scaled plain ones are left and right, and whose `rounding_of` is given.

    Raises:
      ValueError: the rounding is not of these factors.
    """
    factors = list(factors_from_plain(spec, left, right))
    guess = factors[_scaled_one(spec)]
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b64decode(rounding, validate=True), guess.nbytes)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"a rounding can't be read ({error})") from None
    if len(data) != guess.nbytes or unpacker.unconsumed_tail:
        raise ValueError(f"a rounding is not of {guess.size} numbers")
    bits = _bits(guess) ^ np.frombuffer(data, "<u4").reshape(guess.shape)
    factors[_scaled_one(spec)] = bits.view(np.float32)
    return factors[0], factors[1]


def _scaled_one(spec: AdapterSpec) -> int:
    """Which of a and b the scales are multiplied into."""
    return 0 if spec.mixer == "all" else 1


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)
