"""Examples for classification and regression: from the Hugging Face hub, GLUE by its short names, or local files."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.config.schema import DataConfig
from train.config.tasks import HUB_NAME, PREFIX, glue_task
from train.data.files import Table, missing_column, read_table
from train.data.hub import download_splits, find_split, rows_of_split
from train.data.labels import class_numbers, find_classes, label_words, regression_values
from train.hosts.shares import ALONE, Share


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows: one or two text columns of equal length, and labels int32 (class) or float32 (value) [rows].

    A text that another process holds is None; every process knows all labels.
    """

    texts: tuple[list[str | None], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, which: slice | np.ndarray) -> Split:
        """Some of the rows."""
        numbers = np.arange(len(self))[which]
        return Split(tuple([column[number] for number in numbers] for column in self.texts), self.labels[numbers])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and held-out rows. `label_names` is empty for regression; `notes` are lines for the user."""

    train: Split
    validation: Split
    label_names: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """Outputs of the head: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1


def load_examples(config: DataConfig, task: str, share: Share = ALONE) -> Dataset:
    """The data set of a run, every row checked before any is used.

    Args:
      config: where the rows are, and which columns hold texts and labels.
      task: "classification" or "regression".
      share: the part of the rows that this process reads.

    Raises:
      ValueError: the hub is not in reach; there is no such data set, split, file or column; there are no rows; or a
        text or label can't be used. The message names the row and the remedy.
    """
    glue = glue_task(config.name)
    texts = config.text or (glue.text if glue else ("text",))
    loaded = (_load_files if config.train else _load_hub)(config, (*texts, config.label), share)
    train, validation, names = loaded
    tables = (train, validation)
    notes = [_check_texts(table, texts, share) for table in tables]
    if task == "regression":
        label_names = ()
        labels = [_values_of_all(table, config.label, share) for table in tables]
    else:
        words = [_words_of_all(table, config.label, share) for table in tables]
        classes = find_classes(words[0], config.label, config.label_names or names)
        label_names = classes.names
        labels = [class_numbers(table, config.label, classes) for table in words]
        notes.append(classes.note)
    splits = [_split(table, texts, rows, share) for table, rows in zip(tables, labels, strict=True)]
    if config.held_back is not None:
        splits = _held_back(splits[0], config.held_back, train.source)
        notes.append(f"{train.source}: {config.held_back:,} rows held back and evaluated on (data.held_back)")
    limited = {"train_limit": (train.source, splits[0]), "eval_limit": (validation.source, splits[1])}
    notes += [_limit_note(source, split, name, getattr(config, name)) for name, (source, split) in limited.items()]
    return Dataset(
        splits[0].rows(slice(config.train_limit)),
        splits[1].rows(slice(config.eval_limit)),
        label_names,
        tuple(note for note in notes if note),
    )


def _split(table: Table, texts: Sequence[str], labels: np.ndarray, share: Share) -> Split:
    return Split(tuple(share.spread(table.columns[column]) for column in texts), labels)


def _held_back(train: Split, count: int, source: str) -> list[Split]:
    """The training rows without `count` of them, and those `count`: the same for every seed of a run."""
    if count >= len(train):
        raise ValueError(f"{source}: data.held_back={count} leaves none of {len(train)} rows to train on; lower it")
    drawn = np.random.default_rng(0).permutation(len(train))
    return [train.rows(np.sort(drawn[count:])), train.rows(np.sort(drawn[:count]))]


def _limit_note(source: str, split: Split, name: str, limit: int | None) -> str | None:
    if limit is None or limit >= len(split):
        return None
    return f"{source}: first {limit:,} of {len(split):,} rows taken (data.{name})"


def _values_of_all(table: Table, column: str, share: Share) -> np.ndarray:
    values = share.gather(lambda: regression_values(table, column).tolist())
    return np.array([value for part in values for value in part], np.float32)


def _words_of_all(table: Table, column: str, share: Share) -> Table:
    """The labels of every process's rows as words, with the places of the rows."""
    parts: Any = share.gather(lambda: [label_words(table, column), [*table.numbers]])
    words, numbers = (list(itertools.chain.from_iterable(part)) for part in zip(*parts, strict=True))
    return Table(table.source, {column: words}, table.unit, numbers)


def _check_texts(table: Table, columns: Sequence[str], share: Share) -> str | None:
    """Raises if a text is not a string; returns a note if some are empty."""
    empty = sum(share.gather(lambda: _count_empty(table, columns)))
    return f"{table.source}: {empty:,} empty texts in {', '.join(columns)}" if empty else None


def _count_empty(table: Table, columns: Sequence[str]) -> int:
    empty = 0
    for column in columns:
        for row, value in enumerate(table.columns[column]):
            if not isinstance(value, str):
                raise ValueError(f"{table.where(row)}: {column}={value!r} is not text; give every row a string")
            empty += not value.strip()
    return empty


def _load_files(config: DataConfig, columns: Sequence[str], share: Share) -> tuple[Table, Table, tuple[str, ...]]:
    return read_table(str(config.train), columns, share), read_table(str(config.validation), columns, share), ()


def _load_hub(config: DataConfig, columns: Sequence[str], share: Share) -> tuple[Table, Table, tuple[str, ...]]:
    """The two splits of a hub data set, and its class names if it declares any."""
    glue = glue_task(config.name)
    name, subset = str(config.name), config.subset
    if glue:
        name, subset = HUB_NAME, name.removeprefix(PREFIX)
    held_out = config.validation_split or (glue.validation_split if glue else "validation")
    splits = share.together(lambda: download_splits(name, subset))
    tables = []
    for split in ("train", held_out):
        found = find_split(splits, str(config.name), split, "set data.validation_split")
        tables.append(_hub_table(f"{config.name} {split}", found, columns, share))
    feature = splits["train"].features[config.label]
    return tables[0], tables[1], tuple(getattr(feature, "names", None) or ())


def _hub_table(source: str, split: Any, columns: Sequence[str], share: Share) -> Table:
    for column in columns:
        if column not in split.column_names:
            raise missing_column(source, column, split.column_names)
    rows = rows_of_split(source, split, share)
    return Table(source, split.select_columns(list(columns)).select(rows)[:], "row", [row + 1 for row in rows])
