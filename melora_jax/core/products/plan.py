"""How x·W + x·ΔW is computed, decided once from shapes, dtype, mesh and platform."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jaxtyping import Array, Bool

from melora_jax.config import AdapterSpec, Strategy
from melora_jax.core.dense_view import DenseView
from melora_jax.core.dropout import adapter_rate, keep_mask
from melora_jax.core.platform import platform
from melora_jax.core.products.cut import Cut

Gradients = Literal["blocks", "latents"]

# `packed` does n times the arithmetic of `batched`, in one wide product instead of n narrow ones. Up to this many
# latents the width is worth it; elsewhere than on CPU, one matrix unit 128 wide is assumed.
PACKED_LATENTS = {"cpu": 32}
PACKED_LATENTS_ELSEWHERE = 128
# Above this many latents "auto" forms W + ΔW, where it may. Elsewhere that was not measured, and so is not taken.
MERGED_LATENTS = {"cpu": 1}
# From this rank on, one mini's ΔW and its gradient cost more than the products with its latents.
LARGEST_MERGED_RANK_OF_ONE = 63
# With fewer tokens, as in generation, forming W + ΔW costs more than it saves.
MERGED_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """How one product x·W + x·ΔW is computed. Plans of equal layers are equal.

    Attributes:
      strategy: "batched", "packed" or "merged".
      spec: the adapter: its scale, mixer, rate of dropout, and the dtype of its products.
      view: how the layer's input and output lie flat.
      platform: where it will run.
      gradients: how "merged" computes the factors' gradients: from the blocks x_kᵀg_k, or by way of the latents.
      cut: how a mesh cuts the product; None on one device.
      precision, output_dtype: of the product with W, as in `jax.lax.dot_general`; None for their defaults.
    """

    strategy: Strategy
    spec: AdapterSpec
    view: DenseView
    platform: str
    gradients: Gradients = "latents"
    cut: Cut | None = None
    precision: Any = None
    output_dtype: Any = None

    def mask(self, shape: tuple[int, ...], path: str) -> Bool[Array, ...] | None:
        """Which entries of a layer's input the adapter's dropout at `path` keeps; None where it drops nothing.

        Args:
          shape: of the layer's input.
          path: names the stream of random numbers.
        """
        return keep_mask(self.view.flat_shape(shape), adapter_rate(self.spec.dropout), path)


def plan_product(
    spec: AdapterSpec,
    view: DenseView,
    tokens: int = 1,
    *,
    mergeable: bool = False,
    cut: Cut | None = None,
    precision: Any = None,
    output_dtype: Any = None,
    on: str | None = None,
) -> ProductPlan:
    """The plan of a product.

    Args:
      spec: the adapter whose factors are multiplied.
      view: how the layer's input and output lie flat.
      tokens: rows of the product on one device.
      mergeable: whether "auto" may form W + ΔW.
      cut: how a mesh cuts the product.
      precision, output_dtype: of the product with W.
      on: the platform; by default the one that is traced for.

    >>> spec = AdapterSpec(n=8, r=(8,) * 8, alpha=(16.0,) * 8)
    >>> plan = plan_product(spec, DenseView(384, 384), 2048, mergeable=True, on="cpu")
    >>> plan.strategy, plan.gradients
    ('merged', 'blocks')
    """
    on = on or platform()
    n, r = spec.n, max(spec.r)
    strategy = planned_strategy(spec, mergeable, on)
    if strategy == "merged" and spec.strategy == "auto" and not merging_pays(tokens, n, r, view.d_in, view.d_out):
        strategy = choose_strategy("auto", n, r, on)
    held = n // cut.parts if cut is not None and cut.minis else n
    by_blocks = spec.mixer == "identity" and blocks_cost_less(held, r, view.d_in // n, view.d_out // n)
    gradients: Gradients = "blocks" if by_blocks else "latents"
    return ProductPlan(strategy, spec, view, on, gradients, cut, precision, output_dtype)


def planned_strategy(spec: AdapterSpec, mergeable: bool = False, on: str | None = None) -> Strategy:
    """The strategy of an adapter's product on many tokens; "merged" gives way where W + ΔW may not be formed.

    Args:
      spec: the adapter.
      mergeable: whether W + ΔW may be formed.
      on: the platform; by default the one that is traced for.

    >>> planned_strategy(AdapterSpec(n=1, r=(8,), alpha=(16.0,), strategy="merged"), on="cpu")
    'packed'
    """
    asked = "auto" if spec.strategy == "merged" and not mergeable else spec.strategy
    return choose_strategy(asked, spec.n, max(spec.r), on or platform(), mergeable)


def choose_strategy(strategy: Strategy, n: int, r: int, on: str, mergeable: bool = False) -> Strategy:
    """The strategy that "auto" stands for on many tokens; others are returned as they are.

    Args:
      strategy: what was asked for.
      n, r: the minis, and the widest of their ranks.
      on: the platform.
      mergeable: whether W + ΔW can be formed without loss.

    >>> choose_strategy("auto", 8, 1, "cpu"), choose_strategy("auto", 8, 8, "cpu")
    ('packed', 'batched')
    >>> choose_strategy("auto", 8, 8, "cpu", True), choose_strategy("auto", 1, 64, "cpu", True)
    ('merged', 'packed')
    """
    if strategy != "auto":
        return strategy
    latents = n * r
    dense = n == 1 and r > LARGEST_MERGED_RANK_OF_ONE
    if mergeable and not dense and latents > MERGED_LATENTS.get(on, latents):
        return "merged"
    # Of one mini both do the same arithmetic.
    return "packed" if n == 1 or latents <= PACKED_LATENTS.get(on, PACKED_LATENTS_ELSEWHERE) else "batched"


def merging_pays(tokens: int, n: int, r: int, d_in: int, d_out: int) -> bool:
    """Whether forming W + ΔW costs less than the products with the latents that it saves.

    The latter take tokens·r·(d_in + d_out) multiplications in each pass. Against them stand r·d_in·o for the blocks of
    ΔW, which may take a quarter of that, and W itself, which is read and written however few the latents are.

    >>> [merging_pays(tokens, 8, 1, 576, 576) for tokens in (1, 512, 2048)]
    [False, False, True]
    """
    to_form_blocks, to_form_sum = 4 * d_in * (d_out // n) // (d_in + d_out), d_in * d_out // (d_in + d_out)
    return tokens >= max(MERGED_TOKENS, to_form_blocks, 24 * to_form_sum // (n * r))


def blocks_cost_less(n: int, r: int, i: int, o: int) -> bool:
    """Whether the n blocks x_kᵀg_k, `[i, o]`, cost less than products with n·r latents.

    The latter, n²·r·(i + o) multiplications a token when packed, count three times, because they are so narrow.

    >>> blocks_cost_less(8, 8, 48, 48), blocks_cost_less(1, 8, 384, 384)
    (True, False)
    """
    return i * o <= 3 * n * r * (i + o)
