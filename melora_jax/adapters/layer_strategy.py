"""What a layer's strategy stands for: what was asked for, what its base allows, and what pays on its tokens."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from melora_jax.adapters.merged_output import why_unmergeable
from melora_jax.config import AdapterSpec, Strategy
from melora_jax.core.platform import platform
from melora_jax.core.products.plan import choose_strategy, merging_pays, unmerged


def chosen_strategy(base: Any, spec: AdapterSpec, latents: int, variant: str | None, path: str) -> Strategy:
    """The strategy of a layer, where "merged" may still give way to few tokens (`strategy_on`).

    Args:
      base: the layer that has the adapter.
      spec: the adapter.
      latents: n·r of the product that is computed.
      variant: the name of a class of adapters that are no sum of W and s·A·B; None for plain ones.
      path: for errors.

    Raises:
      ValueError: it is "merged", which the base or the variant does not allow.

    >>> base = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
    >>> chosen_strategy(base, AdapterSpec(n=2, r=(1, 1), alpha=(1.0, 1.0), strategy="packed"), 2, None, "query")
    'packed'
    """
    why_not = f"a {variant} is no sum of W and s·A·B" if variant else why_unmergeable(base, spec)
    if spec.strategy == "merged" and why_not is not None:
        raise ValueError(f'strategy="merged" at {path or "a layer"}: {why_not}; use strategy="batched" or "auto"')
    # Where the sum would be rounded to less than float32, or a quantised kernel made whole, it must be asked for.
    exact = why_not is None and isinstance(base, nnx.Linear) and _in_float32(base, spec)
    mergeable = exact and spec.dropout == 0 and spec.mixer == "identity"  # else ΔW is a dense product
    return choose_strategy(spec.strategy, latents, platform(), mergeable)


def _in_float32(base: nnx.Linear, spec: AdapterSpec) -> bool:
    computed = spec.dtype or base.dtype or base.param_dtype
    return jnp.dtype(computed) == base.param_dtype == jnp.float32


def strategy_on(tokens: int, chosen: Strategy, asked: Strategy, a: tuple[int, ...], b: tuple[int, ...]) -> Strategy:
    """What the chosen strategy stands for with so many tokens on a device: "auto" forms W + ΔW where that pays.

    Args:
      tokens: rows of the product.
      chosen: by `chosen_strategy`.
      asked: what the settings say.
      a, b: the factors' shapes, [n i r] and [n r o].
    """
    if chosen != "merged" or asked == "merged" or merging_pays(tokens, a, b):
        return chosen
    return unmerged(chosen, a[0] * a[2], platform())


def sums_whole(base: Any, n: int, r: int) -> bool:
    """Whether a layer's output and its adapter's are summed in one call (`whole_sum`).

    One latent's product is not kept anyway. A bias is a third term, with which MiniLM's step took two to five per cent
    longer, but for minis of rank 1, whose update is made where it is added (n=32: as long, 688 MB for 846).
    """
    return n * r > 1 and hasattr(base, "bias") and (base.bias is None or r == 1)
