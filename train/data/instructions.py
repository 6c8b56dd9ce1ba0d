"""Instruction data from local files or the hub, with held-out rows of its own or drawn from the training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from train.config.schema import DataConfig
from train.data.conversations import FORMATS, Conversation, find_format, read_conversations
from train.data.files import find_rows, no_rows
from train.data.hub import download_splits, find_split, rows_of_split
from train.hosts.shares import ALONE, Share

T = TypeVar("T")
PlacedRows = list[tuple[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Training and held-out conversations; `notes` are lines for the user.

    A conversation that another process holds is None.
    """

    train: list[Conversation | None]
    validation: list[Conversation | None]
    notes: tuple[str, ...]


def load_instructions(
    config: DataConfig,
    form: str | None = None,
    held_out: int | None = None,
    seed: int = 42,
    share: Share = ALONE,
) -> Instructions:
    """The conversations of a run, every row checked before any is used.

    Args:
      config: where the rows are (`name`, `subset`, `validation_split`; or `train`, `validation`), and the limits.
      form: the rows' format, a key of `train.data.conversations.FORMATS`; by default the one that fits the columns.
      held_out: how many training rows to draw and hold out, instead of reading a held-out split.
      seed: of that draw; with 42 the authors' `train_test_split(test_size=held_out, shuffle=True, seed=42)`.
      share: the part of the rows that this process reads.

    Raises:
      ValueError: the hub is not in reach; there is no such data set, split or file; the columns fit no format; a row
        can't be used; or there are too few rows to hold out `held_out`.
    """
    if form is not None and form not in FORMATS:
        raise ValueError(f"there is no format {form!r} of instruction data; choose from {', '.join(FORMATS)}")
    parts = (_hub_rows if config.name else _file_rows)(config, held_out is None, share)
    source, rows = parts[0]
    columns = next(filter(None, share.gather(lambda: list(rows[0][1]) if rows else [])))
    form = form or find_format(columns, source)
    notes = [f"{source}: rows of format {form}"]
    read = []
    for name, rows in parts:
        conversations, remarks = read_conversations(rows, form, share)
        read.append(share.spread(conversations))
        notes += [f"{name}: {remark}" for remark in remarks]
    if held_out is not None:
        read = list(hold_out(read[0], held_out, seed, source))
        notes.append(f"{source}: {held_out:,} rows drawn to be held out (seed {seed})")
    train, validation = read
    for key, part in {"train_limit": train, "eval_limit": validation}.items():
        limit = getattr(config, key)
        if limit is not None and limit < len(part):
            notes.append(f"first {limit:,} of {len(part):,} rows taken (data.{key})")
    return Instructions(train[: config.train_limit], validation[: config.eval_limit], tuple(notes))


def hold_out(rows: Sequence[T], count: int, seed: int, source: str) -> tuple[list[T], list[T]]:
    """(the other rows, `count` rows), both in the order that `datasets.train_test_split` draws from `seed`.

    Raises:
      ValueError: one of the parts would be empty.
    """
    if not 0 < count < len(rows):
        raise ValueError(f"{count:,} rows can't be held out of the {len(rows):,} of {source}; choose fewer, at least 1")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[row] for row in order[count:]], [rows[row] for row in order[:count]]


def _file_rows(config: DataConfig, both: bool, share: Share) -> list[tuple[str, PlacedRows]]:
    paths = [Path(str(path)) for path in ((config.train, config.validation) if both else (config.train,))]
    return [(str(path), _placed_rows(path, share)) for path in paths]


def _placed_rows(path: Path, share: Share) -> PlacedRows:
    part = find_rows(path, share)
    rows = share.together(lambda: [(f"{path} {part.unit} {number}", record) for number, record in part.rows()])
    if not sum(share.gather(lambda: len(rows))):
        raise no_rows(path)
    return rows


def _hub_rows(config: DataConfig, both: bool, share: Share) -> list[tuple[str, PlacedRows]]:
    splits = share.together(lambda: download_splits(str(config.name), config.subset))
    remedy = "set data.validation_split, or hold out some of the training rows"
    parts = []
    for split in ("train", config.validation_split or "validation") if both else ("train",):
        source, found = f"{config.name} {split}", find_split(splits, str(config.name), split, remedy)
        own = rows_of_split(source, found, share)
        rows = enumerate(found.select(own).to_list(), start=own.start + 1)
        parts.append((source, [(f"{source} row {row}", record) for row, record in rows]))
    return parts
