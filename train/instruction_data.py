"""Where instruction data comes from: local files or a hub data set, with held-out rows of their own or drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.conversations import FORMATS, Conversation, find_format, read_conversations
from train.data import download_splits
from train.files import READERS, read_table
from train.sections import DataConfig

PlacedRows = list[tuple[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Training and held-out conversations; `notes` are lines that the user should see."""

    train: list[Conversation]
    validation: list[Conversation]
    notes: tuple[str, ...]


def load_instructions(
    config: DataConfig, form: str | None = None, held_out: int | None = None, seed: int = 42
) -> Instructions:
    """The conversations of a run, every row checked before any is used.

    Args:
      config: where the rows are (`name`, `subset`, `validation_split`; or `train`, `validation`), and the limits.
      form: the rows' format, a key of `train.conversations.FORMATS`; by default the one that fits the columns.
      held_out: draw so many training rows to hold out, instead of reading others.
      seed: of that draw; with 42 the authors' `train_test_split(test_size=held_out, shuffle=True, seed=42)`.

    Raises:
      ValueError: hub not in reach, no such data set, split or file, columns of no format, a row that can't be used, or
        too few rows to hold out so many.
    """
    if form is not None and form not in FORMATS:
        raise ValueError(f"there is no format {form!r} of instruction data; choose from {', '.join(FORMATS)}")
    parts = _hub_rows(config, held_out is None) if config.name else _file_rows(config, held_out is None)
    source, rows = parts[0]
    form = form or find_format(list(rows[0][1]), source)
    notes = [f"{source}: rows of format {form}"]
    read = []
    for name, rows in parts:
        conversations, remarks = read_conversations(rows, form)
        read.append(conversations)
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


def hold_out(
    rows: list[Conversation], count: int, seed: int, source: str
) -> tuple[list[Conversation], list[Conversation]]:
    """(the other rows, `count` rows), both in an order drawn from `seed` as `datasets.train_test_split` draws it.

    Raises:
      ValueError: not both parts would have a row.
    """
    if not 0 < count < len(rows):
        raise ValueError(f"{count:,} rows can't be held out of the {len(rows):,} of {source}; choose fewer, at least 1")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[row] for row in order[count:]], [rows[row] for row in order[:count]]


def _file_rows(config: DataConfig, both: bool) -> list[tuple[str, PlacedRows]]:
    paths = [Path(str(path)) for path in ((config.train, config.validation) if both else (config.train,))]
    return [(str(path), list(_placed(path))) for path in paths]


def _placed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    table = read_table(path, ())  # for its checks of the path and of there being rows
    _, reader = READERS[path.suffix.lower()]
    for row, (_, record) in enumerate(reader(path)):
        yield table.where(row), record


def _hub_rows(config: DataConfig, both: bool) -> list[tuple[str, PlacedRows]]:
    splits = download_splits(str(config.name), config.subset)
    parts = []
    for split in ("train", config.validation_split or "validation") if both else ("train",):
        source = f"{config.name} {split}"
        if split not in splits:
            there = ", ".join(map(str, splits))
            remedy = "set data.validation_split, or hold out some of the training rows"
            raise ValueError(f"{config.name} has no split {split!r}; splits there: {there}; {remedy}")
        if not len(splits[split]):
            raise ValueError(f"{source} holds no rows; choose another split")
        rows = enumerate(splits[split].to_list(), start=1)
        parts.append((source, [(f"{source} row {row}", record) for row, record in rows]))
    return parts
