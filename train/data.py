"""Examples for classification and regression: from the Hugging Face hub, GLUE by its short names, or local files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.files import Table, missing_column, read_table
from train.glue import HUB_NAME, PREFIX, glue_task
from train.labels import class_numbers, find_classes, regression_values
from train.sections import DataConfig

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows: one or two text columns of equal length, and labels int32 (class) or float32 (value) [rows]."""

    texts: tuple[list[str], ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, which: slice | np.ndarray) -> Split:
        """Some of the rows."""
        numbers = np.arange(len(self))[which]
        return Split(tuple([column[number] for number in numbers] for column in self.texts), self.labels[numbers])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and held-out rows. `label_names` is empty for regression; `notes` are lines the user should see."""

    train: Split
    validation: Split
    label_names: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """Outputs of the head: the number of classes, or 1 for regression."""
        return len(self.label_names) or 1


def load_examples(config: DataConfig, task: str) -> Dataset:
    """The data set of a run, every row checked before any is used.

    Args:
      config: where the rows are, and which columns.
      task: "classification" or "regression".

    Raises:
      ValueError: hub not in reach, no such data set, split, file or column, no rows, text or labels that can't be used;
        the message names the row and the remedy.
    """
    glue = glue_task(config.name)
    texts = config.text or (glue.text if glue else ("text",))
    train, validation, names = (_load_files if config.train else _load_hub)(config, (*texts, config.label))
    notes = [_check_texts(train, texts), _check_texts(validation, texts)]
    if task == "regression":
        label_names = ()
        labels = [regression_values(table, config.label) for table in (train, validation)]
    else:
        classes = find_classes(train, config.label, config.label_names or names)
        label_names = classes.names
        labels = [class_numbers(table, config.label, classes) for table in (train, validation)]
        notes.append(classes.note)
    splits = [_split(table, texts, numbers) for table, numbers in zip((train, validation), labels, strict=True)]
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


def _split(table: Table, texts: Sequence[str], labels: np.ndarray) -> Split:
    return Split(tuple(table.columns[column] for column in texts), labels)


def _held_back(train: Split, count: int, source: str) -> list[Split]:
    """The training rows without `count` of them, and these: the same whatever the run's seed is."""
    if count >= len(train):
        raise ValueError(f"{source}: data.held_back={count} leaves none of {len(train)} rows to train on; lower it")
    drawn = np.random.default_rng(0).permutation(len(train))
    return [train.rows(np.sort(drawn[count:])), train.rows(np.sort(drawn[:count]))]


def _limit_note(source: str, split: Split, name: str, limit: int | None) -> str | None:
    if limit is None or limit >= len(split):
        return None
    return f"{source}: first {limit:,} of {len(split):,} rows taken (data.{name})"


def _check_texts(table: Table, columns: Sequence[str]) -> str | None:
    """Raises where a text is no string; returns a note where some are empty."""
    empty = 0
    for column in columns:
        for row, value in enumerate(table.columns[column]):
            if not isinstance(value, str):
                raise ValueError(f"{table.where(row)}: {column}={value!r} is no text; give every row a string")
            empty += not value.strip()
    return f"{table.source}: {empty:,} empty texts in {', '.join(columns)}" if empty else None


def _load_files(config: DataConfig, columns: Sequence[str]) -> tuple[Table, Table, tuple[str, ...]]:
    return read_table(str(config.train), columns), read_table(str(config.validation), columns), ()


def _load_hub(config: DataConfig, columns: Sequence[str]) -> tuple[Table, Table, tuple[str, ...]]:
    """The two splits of a hub data set, and its class names if it declares any."""
    glue = glue_task(config.name)
    name, subset = str(config.name), config.subset
    if glue:
        name, subset = HUB_NAME, name.removeprefix(PREFIX)
    held_out = config.validation_split or (glue.validation_split if glue else "validation")
    splits = download_splits(name, subset)
    tables = []
    for split in ("train", held_out):
        if split not in splits:
            there = ", ".join(map(str, splits))
            raise ValueError(f"{config.name} has no split {split!r}; splits there: {there}; set data.validation_split")
        tables.append(_hub_table(f"{config.name} {split}", splits[split], columns))
    feature = splits["train"].features[config.label]
    return tables[0], tables[1], tuple(getattr(feature, "names", None) or ())


def download_splits(name: str, subset: str | None) -> DatasetDict:
    """A hub data set's splits.

    Raises:
      ValueError: the hub is not in reach, or has no such data set or subset.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(name, subset)
    except ConnectionError as error:
        remedy = "check the network, or give local files by data.train and data.validation"
        raise ValueError(f"the Hugging Face hub is not in reach for {name!r}; {remedy}") from error
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data set {name!r} can't be loaded; check data.name and data.subset: {reason}") from error


def _hub_table(source: str, split: Any, columns: Sequence[str]) -> Table:
    for column in columns:
        if column not in split.column_names:
            raise missing_column(source, column, split.column_names)
    if not len(split):
        raise ValueError(f"{source} holds no rows; choose another split")
    return Table(source, split.select_columns(list(columns))[:], "row", range(1, len(split) + 1))
