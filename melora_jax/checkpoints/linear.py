"""AdaLoRA and PiSSA adapters as the plain MELoRA that they compute; DoRA has no such form."""

from __future__ import annotations

import dataclasses

from melora_jax.adapters.kinds import kind_of
from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors, config_of_sites


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
