"""Which way of computing an adapter's product is taken, by what was measured."""

from __future__ import annotations

from melora_jax.config import Strategy

# The packed form does n times the arithmetic of the batched one, in one wide product instead of n narrow ones.
# Up to this many latents the width is worth it: measured on CPU; elsewhere one 128-wide matrix unit is assumed.
PACKED_LATENTS = {"cpu": 32}
PACKED_LATENTS_ELSEWHERE = 128
# Above this many latents W + ΔW is formed instead, where that can be done (`merged_product`). On 2 CPU cores MiniLM's
# step, all linear layers adapted, over the frozen limit, packed : merged: n=1 r=1 1.01 : 1.03, n=1 r=8 1.19 : 1.15, n=8
# r=8 1.46 : 1.16; of rank 1 see `merging_pays`. Not measured elsewhere, and so not taken there.
MERGED_LATENTS = {"cpu": 1}
# Below this many tokens (generation) forming W + ΔW costs more than it saves.
MERGED_TOKENS = 256


def choose_strategy(strategy: Strategy, latents: int, backend: str, mergeable: bool = False) -> Strategy:
    """The strategy that `"auto"` stands for on a platform; others are returned as they are.

    Args:
      strategy: what was asked for.
      latents: n·r.
      backend: the platform (`core.platform.platform`).
      mergeable: whether W + ΔW can be formed at no loss.

    >>> choose_strategy("auto", 8, "cpu"), choose_strategy("auto", 64, "cpu"), choose_strategy("auto", 64, "cpu", True)
    ('packed', 'batched', 'merged')
    """
    if strategy != "auto":
        return strategy
    if mergeable and latents > MERGED_LATENTS.get(backend, latents):
        return "merged"
    return "packed" if latents <= PACKED_LATENTS.get(backend, PACKED_LATENTS_ELSEWHERE) else "batched"


def unmerged(strategy: Strategy, latents: int, backend: str) -> Strategy:
    """The strategy by which an adapter is computed beside its base: what was asked for, and for `merged` the usual one.

    >>> unmerged("merged", 8, "cpu"), unmerged("merged", 64, "cpu"), unmerged("packed", 64, "cpu")
    ('packed', 'batched', 'packed')
    """
    return strategy if strategy != "merged" else choose_strategy("auto", latents, backend)


def sums_columns(n: int, r: int, backend: str) -> bool:
    """Whether "auto", where it does not merge, has the factors' gradients as sums over rows, column by column.

    So it is where it takes `packed` for minis of rank 1 on CPU, in place of a product of which all but the diagonal
    blocks are thrown away (`block_diagonal_product`).

    >>> sums_columns(8, 1, "cpu"), sums_columns(8, 2, "cpu"), sums_columns(8, 1, "gpu"), sums_columns(64, 1, "cpu")
    (True, False, False, False)
    """
    return backend == "cpu" and r == 1 and n <= PACKED_LATENTS[backend]


def merging_pays(tokens: int, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether W + ΔW is formed for less than the products with the latents that it saves.

    Two things are to be weighed against the latter's tokens·r·(d_in + d_out) multiplications, in both passes: r·d_in·o
    for the blocks of ΔW, of which at most a quarter may go there; and W itself, which is read and written however few
    the latents are. SmolLM2's step (512 tokens), all linear layers adapted, over the frozen limit, packed : merged: n=8
    r=1 1.07 : 1.09, n=32 r=1 1.10 : 1.12, n=8 r=8 1.22 : 1.17; MiniLM's (2,048 tokens): n=4 r=1 1.11 : 1.08, n=8 r=1
    1.13 : 1.06, n=32 r=1 1.24 : 1.14. Since updates of rank 1 are made where they are added, MiniLM's are n=8 r=1 1.07
    : 1.07 (678 MB : 714), n=32 r=1 1.14 : 1.11.

    Args:
      tokens: rows of the product.
      a, b: the factors' shapes, [n i r] and [n r o].

    >>> [merging_pays(tokens, (8, 72, 1), (8, 1, 72)) for tokens in (1, 512, 2048)]
    [False, False, True]
    """
    (n, i, r), o = a, b[2]
    d_in, d_out = n * i, n * o
    to_form_blocks, to_form_sum = 4 * d_in * o // (d_in + d_out), d_in * d_out // (d_in + d_out)
    # Products with fewer latents than the processor's registers hold cost no less; of rank 1 there are fewer of them.
    weight, latents = (96, max(n, 16)) if sums_columns(n, r, "cpu") else (24, n * r)
    return tokens >= max(MERGED_TOKENS, to_form_blocks, weight * to_form_sum // latents)
