"""Which rows make a batch, and its arrays: static shapes, an order set by (seed, step), no iterator state."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.tokens import Tokens

Batch = dict[str, Any]  # the arrays of a step by name
# Batches whose rows are sorted by length together: a larger pool pads less, and mixes lengths less.
POOL = 50
# Stands for what another process holds. It is less than any token id, so the largest value that any process has for a
# place is the right one.
ABSENT = -1


class BatchRows(NamedTuple):
    """The rows of one batch: `indices` int64 [batch_size], -1 for a place without a row; `width` in tokens."""

    indices: np.ndarray
    width: int

    @property
    def places(self) -> int:
        """Rows of the batch, empty ones included."""
        return len(self.indices)


def bucket_widths(buckets: Sequence[int], max_length: int) -> tuple[int, ...]:
    """The widths batches may have: those below `max_length`, and `max_length`.

    >>> bucket_widths((16, 32, 64), 48)
    (16, 32, 48)
    """
    return (*(width for width in buckets if width < max_length), max_length)


class BatchPlan:
    """Training batches: step → rows and width, a pure function of (seed, step).

    An epoch shuffles all rows, sorts pools of `POOL` batches by length, cuts them into batches and shuffles those.
    Every row comes once an epoch. Batches differ by at most one row; empty places are marked -1. Random numbers are the
    raw words of Philox, which NumPy keeps the same across versions and machines.

    Args:
      lengths: tokens of each row, int [rows].
      batch_size: places in a batch.
      buckets: rising widths, from `bucket_widths`.
      seed: of the order.

    Raises:
      ValueError: no rows, or a row longer than the last bucket.

    >>> plan = BatchPlan(np.array([3, 9, 4]), batch_size=2, buckets=(4, 16), seed=0)
    >>> plan.steps_per_epoch, plan.widths
    (2, (4, 16))
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, buckets: Sequence[int], seed: int) -> None:
        _check_lengths(lengths, buckets)
        self._lengths, self._batch_size, self._buckets, self._seed = lengths, batch_size, tuple(buckets), seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        # The longest row of a batch sets its width, so only widths that some row needs can occur.
        self.widths = tuple(sorted({_width(int(length), self._buckets) for length in np.unique(lengths)}))
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, step: int) -> BatchRows:
        """The batch of `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return _batch_rows(self._epoch(epoch)[place], self._lengths, self._batch_size, self._buckets)

    def reseeded(self, seed: int) -> BatchPlan:
        """The plan of the same rows in another order."""
        return BatchPlan(self._lengths, self._batch_size, self._buckets, seed)

    def _draw_epoch(self, epoch: int) -> list[np.ndarray]:
        rows, steps = len(self._lengths), self.steps_per_epoch
        noise = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(rows + steps)
        order = np.argsort(noise[:rows], kind="stable")
        edges = np.arange(steps + 1) * rows // steps
        batches: list[np.ndarray] = []
        for first in range(0, steps, POOL):
            cuts = edges[first : first + POOL + 1]
            pool = order[cuts[0] : cuts[-1]]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += np.split(pool, cuts[1:-1] - cuts[0])
        return [batches[place] for place in np.argsort(noise[rows:], kind="stable")]


def eval_batches(lengths: np.ndarray, batch_size: int, buckets: Sequence[int]) -> list[BatchRows]:
    """Batches that hold every row once, the longest first, so that memory runs out in the first batch or never.

    Raises:
      ValueError: no rows, or a row longer than the last bucket.
    """
    _check_lengths(lengths, buckets)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    groups = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    return [_batch_rows(group, lengths, batch_size, buckets) for group in groups]


def make_batch(
    tokens: Tokens, labels: np.ndarray, indices: np.ndarray, width: int, pad_id: int
) -> dict[str, np.ndarray]:
    """The arrays of one batch.

    Args:
      tokens: ragged token ids of all rows.
      labels: int32 or float32 [rows].
      indices: [b] from a `BatchRows`; a place marked -1 repeats the batch's first row with weight 0, because a
        row of padding alone would leave attention without a key.
      width: t, tokens a row after padding.
      pad_id: the tokenizer's padding id.

    Returns:
      input_ids, attention_mask and, if the model has them, token_type_ids int32 [b, t]; labels and weight [b].
      A token of a row that another process holds is `ABSENT`.
    """
    rows = np.where(indices < 0, indices[0], indices)
    batch = {"input_ids": np.full((len(rows), width), pad_id, np.int32)}
    batch["attention_mask"] = np.zeros_like(batch["input_ids"])
    if tokens.token_type_ids is not None:
        batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    for place, row in enumerate(rows):
        length, ids = tokens.lengths[row], tokens.input_ids[row]
        batch["input_ids"][place, :length] = ABSENT if ids is None else ids
        batch["attention_mask"][place, :length] = 1
        if tokens.token_type_ids is not None:
            types = tokens.token_type_ids[row]
            batch["token_type_ids"][place, :length] = ABSENT if types is None else types
    return batch | {"labels": labels[rows], "weight": (indices >= 0).astype(np.float32)}


def _batch_rows(rows: np.ndarray, lengths: np.ndarray, batch_size: int, buckets: Sequence[int]) -> BatchRows:
    indices = np.full(batch_size, -1, np.int64)
    indices[: len(rows)] = rows
    return BatchRows(indices, _width(int(lengths[rows].max()), buckets))


def _width(length: int, buckets: Sequence[int]) -> int:
    return next(width for width in buckets if width >= length)


def _check_lengths(lengths: np.ndarray, buckets: Sequence[int]) -> None:
    if not len(lengths):
        raise ValueError("there are no rows to batch; check the data set")
    if lengths.max() > buckets[-1]:
        raise ValueError(
            f"a row has {lengths.max()} tokens but the widest bucket {buckets[-1]}; cut rows when tokenising"
        )
