"""Requests in batches of few sizes; requests that share a context, or the beginning of one, come together."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

Tokens = tuple[int, ...]

_LEAST_SHARED = 64  # tokens; recomputing a shorter beginning is cheaper than a batch of its own
_LEAST_UNIT = 16
_ROWS_A_CONTEXT = 4


@dataclasses.dataclass(frozen=True)
class Pair:
    """A context and a possible continuation, as tokens; neither is empty."""

    context: Tokens
    continuation: Tokens


@dataclasses.dataclass(frozen=True)
class Batch:
    """Continuations `[r, c]` of contexts `[g, t]`, which all begin with the same `shared` tokens.

    Attributes:
      shared: tokens at the beginning of every context.
      ids: int32 `[g, t]`, the rest of each context, padded left.
      valid: bool `[g, t]`, False at padding.
      parents: int32 `[r]`, the context of each continuation.
      continuations: int32 `[r, c]`, padded right.
      counts: int32 `[r]`, the tokens of each continuation.
      requests: the numbers of the first continuations' requests; the remaining continuations only fill the batch.
    """

    shared: Tokens
    ids: np.ndarray
    valid: np.ndarray
    parents: np.ndarray
    continuations: np.ndarray
    counts: np.ndarray
    requests: tuple[int, ...]

    @property
    def places(self) -> int:
        """Places that the cache of these tokens needs; the last token of a continuation is never an input."""
        return len(self.shared) + self.ids.shape[1] + self.continuations.shape[1] - 1


def make_batches(pairs: Sequence[Pair], contexts: int) -> Iterator[Batch]:
    """All pairs in batches of at most `contexts` contexts and four times as many continuations.

    The longest come first, so that memory runs out at once or never, and the estimated time left is never too short.

    >>> pairs = [Pair((7, 8), (1,)), Pair((7, 8), (2, 3)), Pair((9,), (4,))]
    >>> [batch] = make_batches(pairs, contexts=2)
    >>> batch.parents.tolist(), batch.counts.tolist(), batch.requests
    ([0, 0, 1, 0], [1, 2, 1, 1], (0, 1, 2))
    """
    members: dict[Tokens, list[int]] = {}
    for place, pair in enumerate(pairs):
        members.setdefault(pair.context, []).append(place)
    families = _families(sorted(members))
    for shared, family in sorted(families, key=lambda one: -max(map(len, one[1]))):
        groups = [
            (context, tuple(some))
            for context in sorted(family, key=lambda context: (-len(context), context))
            for some in parts_of(members[context], contexts * _ROWS_A_CONTEXT)
        ]
        for some in _filled(groups, contexts):
            yield _batch(pairs, shared, some)


def rounded_up(count: int) -> int:
    """`count` rounded up by at most a quarter, or to a multiple of 16: few sizes, so that few programs are compiled."""
    unit = _unit(count)
    return -(-count // unit) * unit


def power_of_two(count: int) -> int:
    """The next power of two: for rows, which are few only in a last batch."""
    return 1 << (count - 1).bit_length()


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens at the beginning are equal."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def _unit(count: int) -> int:
    return max(_LEAST_UNIT, 1 << max(count.bit_length() - 3, 0))


def _families(contexts: Sequence[Tokens]) -> list[tuple[Tokens, list[Tokens]]]:
    """Sorted contexts, grouped by the beginning that they share; those without a shared beginning are one group."""
    families: list[tuple[Tokens, list[Tokens]]] = []
    alone: list[Tokens] = []
    family, length = [contexts[0]], len(contexts[0])
    for context in [*contexts[1:], ()]:
        shared = min(length, common_length(family[0], context))
        if shared >= max(_LEAST_SHARED, length // 2):
            family, length = [*family, context], shared
            continue
        # at least one token of each context must follow the beginning
        kept = min(length, min(map(len, family)) - 1)
        kept -= kept % _unit(kept)
        if len(family) > 1 and kept >= _LEAST_SHARED:
            families.append((family[0][:kept], family))
        else:
            alone += family
        family, length = [context], len(context)
    return families + ([((), alone)] if alone else [])


def parts_of(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive parts of `size` places; the last may be shorter."""
    return (places[start : start + size] for start in range(0, len(places), size))


_Group = tuple[Tokens, tuple[int, ...]]


def _filled(groups: Sequence[_Group], contexts: int) -> Iterator[list[_Group]]:
    """Consecutive groups, as many as fit into each batch."""
    batch: list[_Group] = []
    for group in groups:
        rows = sum(len(places) for _, places in batch) + len(group[1])
        if batch and (len(batch) == contexts or rows > contexts * _ROWS_A_CONTEXT):
            yield batch
            batch = []
        batch.append(group)
    yield batch


def _batch(pairs: Sequence[Pair], shared: Tokens, groups: Sequence[_Group]) -> Batch:
    rests = [context[len(shared) :] for context, _ in groups]
    requests = tuple(itertools.chain.from_iterable(places for _, places in groups))
    width = rounded_up(max(map(len, rests)))
    ids = np.zeros((power_of_two(len(groups)), width), np.int32)
    valid = np.zeros(ids.shape, bool)
    valid[:, -1] = True
    for row, rest in enumerate(rests):
        ids[row, width - len(rest) :] = rest
        valid[row, width - len(rest) :] = True
    ends = [pairs[place].continuation for place in requests]
    longest = max(map(len, ends))
    # one token more than a rounded size, since the last one is not an input
    columns = 1 if longest == 1 else rounded_up(longest - 1) + 1
    continuations = np.zeros((power_of_two(len(ends)), columns), np.int32)
    counts = np.ones(len(continuations), np.int32)
    parents = np.zeros(len(continuations), np.int32)
    for row, end in enumerate(ends):
        continuations[row, : len(end)] = end
        counts[row] = len(end)
    parents[: len(ends)] = np.repeat(np.arange(len(groups)), [len(places) for _, places in groups])
    return Batch(shared, ids, valid, parents, continuations, counts, requests)
