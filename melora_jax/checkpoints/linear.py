"""Adapters of other kinds as the plain MELoRA that they compute, in arrays: AdaLoRA and PiSSA; DoRA has none."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors, config_of_sites
from melora_jax.core.initializers import difference, difference_spec


def as_plain(tree: AdapterTree, why: str) -> AdapterTree:
    """The adapter with every site in plain factors; the tree itself where all are.

    Args:
      tree: the adapter.
      why: who needs them plain, for the message.

    Raises:
      ValueError: a site is DoRA's, whose update has no low rank.
    """
    for path, site in tree.sites.items():
        if site.spec.variant == "dora":
            raise ValueError(f"{path} is DoRA's, and {why}; merge the model instead, DoRA's update has no low rank")
    sites = {path: plain_site(site) for path, site in tree.sites.items()}
    if all(sites[path] is site for path, site in tree.sites.items()):
        return tree
    specs = {path: site.spec for path, site in sites.items()}
    config = config_of_sites(specs, tree.config.modules_to_save, tree.config.bias)
    return dataclasses.replace(tree, config=config, sites=sites)


def plain_site(site: SiteFactors) -> SiteFactors:
    """A site of AdaLoRA or PiSSA in plain factors; others as they are."""
    if site.spec.init == "pissa":
        starts = (site.extras["a_start"], site.extras["b_start"])
        a, b = map(np.asarray, difference(*map(jnp.asarray, (site.a, site.b, *starts))))
        return SiteFactors(difference_spec(site.spec), a, b, site.lookup)
    if site.spec.variant == "adalora":
        return _survivors(site)
    return site


def _survivors(site: SiteFactors) -> SiteFactors:
    """The latents whose factor is not zero, it multiplied into A; a mini that has none left keeps one of zeros."""
    e, old = site.extras["e"], site.spec
    kept = [np.flatnonzero(row) if row.any() else np.array([0]) for row in e]
    r = tuple(len(latents) for latents in kept)
    a = np.zeros((*site.a.shape[:2], max(r)), np.float32)
    b = np.zeros((old.n, max(r), site.b.shape[2]), np.float32)
    for k, latents in enumerate(kept):
        a[k, :, : len(latents)] = site.a[k][:, latents] * e[k, latents]
        b[k, : len(latents)] = site.b[k, latents]
    alpha = tuple(scale * rank for scale, rank in zip(old.scales, r, strict=True))  # the scale stays that of the start
    return SiteFactors(dataclasses.replace(old, r=r, alpha=alpha, scaling="mini", variant="plain"), a, b, site.lookup)
