"""Examples packed into rows of one width, each hidden from the others: the plan of rows, and the arrays of a batch."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.data.batching import ABSENT, BatchRows
from train.data.tokens import Examples


class PackedRows(NamedTuple):
    """The rows of one batch: the examples of each in order, none in an empty place; `width` in tokens."""

    rows: tuple[tuple[int, ...], ...]
    width: int

    @property
    def places(self) -> int:
        """Rows of the batch, empty ones included."""
        return len(self.rows)


class PackPlan:
    """Training batches of packed rows: step → examples of each row, a pure function of (seed, step).

    Rows are filled by best fit, the longest examples first, so the lengths alone decide how many rows there are. Each
    epoch draws the order of rows, and which of the examples of equal length go where. Every example comes once an
    epoch; batches differ by at most one row. Random numbers are drawn as in `train.data.batching.BatchPlan`.

    Args:
      lengths: tokens of each example, int [examples].
      batch_size: rows a batch.
      width: tokens a row.
      seed: of the order.

    Raises:
      ValueError: no examples, or one longer than a row.

    >>> plan = PackPlan(np.array([3, 9, 4, 2]), batch_size=2, width=10, seed=0)
    >>> plan.steps_per_epoch, plan.widths, plan.batch(0)
    (1, (10,), PackedRows(rows=((2, 0, 3), (1,)), width=10))
    >>> print(plan)
    4 examples in 2 rows of 10 tokens, 90.0 % full
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, width: int, seed: int) -> None:
        self._lengths, self._batch_size, self._width, self._seed = lengths, batch_size, width, seed
        self._ranks = _best_fit(lengths, width)
        self.widths = (width,)
        self.steps_per_epoch = -(-len(self._ranks) // batch_size)
        self._epoch = functools.lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def efficiency(self) -> float:
        """The share of an epoch's tokens that belong to examples."""
        return float(self._lengths.sum() / (self.steps_per_epoch * self._batch_size * self._width))

    def __str__(self) -> str:
        rows = len(self._ranks)
        full = 100 * self._lengths.sum() / (rows * self._width)
        return f"{len(self._lengths):,} examples in {rows:,} rows of {self._width:,} tokens, {full:.1f} % full"

    def batch(self, step: int) -> PackedRows:
        """The batch of `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place]

    def reseeded(self, seed: int) -> PackPlan:
        """The plan of the same examples in another order."""
        return PackPlan(self._lengths, self._batch_size, self._width, seed)

    def _draw_epoch(self, epoch: int) -> list[PackedRows]:
        examples, rows, steps = len(self._lengths), len(self._ranks), self.steps_per_epoch
        noise = np.random.Philox(np.random.SeedSequence([self._seed, epoch])).random_raw(examples + rows)
        drawn = np.argsort(noise[:examples], kind="stable")
        by_length = drawn[np.argsort(-self._lengths[drawn].astype(np.int64), kind="stable")]
        order = np.argsort(noise[examples:], kind="stable")
        packed = [tuple(by_length[self._ranks[row]].tolist()) for row in order]
        edges = np.arange(steps + 1) * rows // steps
        return [_batch(packed[first:end], self._batch_size, self._width) for first, end in itertools.pairwise(edges)]


def packed_eval_batches(lengths: np.ndarray, batch_size: int, width: int) -> list[PackedRows]:
    """Batches of packed rows that hold every example once, whatever the seed.

    Raises:
      ValueError: no examples, or one longer than a row.
    """
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows = [tuple(by_length[ranks].tolist()) for ranks in _best_fit(lengths, width)]
    return [_batch(rows[first : first + batch_size], batch_size, width) for first in range(0, len(rows), batch_size)]


def make_token_batch(examples: Examples, rows: PackedRows | BatchRows, pad_id: int) -> dict[str, np.ndarray]:
    """The arrays of one batch: of packed rows, or of one example a row.

    Args:
      examples: token ids of all examples, and which of them count in the loss.
      rows: from a `PackPlan` or a `BatchPlan`; an empty place becomes a row of padding.
      pad_id: the id of padding.

    Returns:
      int32 [b, t]: input_ids; attention_mask, 0 at padding; segment_ids, 1, 2 … within a row and 0 at padding;
      position_ids, from 0 in each segment; labels, the next token of the same segment. float32 [b, t]: weights, 1 where
      that next token counts in the loss, so 0 at a segment's end and at padding. For an example that another process
      holds, ids and labels are `train.data.batching.ABSENT` and weights 0.
    """
    groups = rows.rows if isinstance(rows, PackedRows) else [(row,) if row >= 0 else () for row in rows.indices]
    shape = (len(groups), rows.width)
    batch: dict[str, np.ndarray] = {"weights": np.zeros(shape, np.float32)}
    batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "position_ids")}
    batch |= {name: np.full(shape, pad_id, np.int32) for name in ("input_ids", "labels")}
    for row, group in enumerate(groups):
        start = 0
        for segment, example in enumerate(group, start=1):
            ids, counted = examples.input_ids[example], examples.counted[example]
            length = int(examples.lengths[example])
            end = start + length
            batch["input_ids"][row, start:end] = ABSENT if ids is None else ids
            batch["segment_ids"][row, start:end] = segment
            batch["position_ids"][row, start:end] = np.arange(length)
            batch["labels"][row, start : end - 1] = ABSENT if ids is None else ids[1:]
            batch["weights"][row, start : end - 1] = 0 if counted is None else counted[1:]
            start = end
    return batch | {"attention_mask": (batch["segment_ids"] > 0).astype(np.int32)}


def _batch(rows: Sequence[tuple[int, ...]], batch_size: int, width: int) -> PackedRows:
    return PackedRows((*rows, *[()] * (batch_size - len(rows))), width)


def _best_fit(lengths: np.ndarray, width: int) -> list[list[int]]:
    """Rows of ranks, rank 0 being the longest example: each goes into the fullest row that has room for it."""
    if not len(lengths):
        raise ValueError("there are no examples to pack; check the data set")
    if lengths.max() > width:
        raise ValueError(f"an example has {lengths.max()} tokens but a row {width}; cut examples when tokenising")
    rows: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of room left in rows, rising
    with_room: dict[int, list[int]] = {}
    for rank, length in enumerate(-np.sort(-lengths.astype(np.int64))):
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, row = width, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        rows[row].append(rank)
        left = room - int(length)
        if not with_room.setdefault(left, []):
            bisect.insort(rooms, left)
        with_room[left].append(row)
    return rows
