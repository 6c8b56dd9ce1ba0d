"""Labels as the data set has them → checked class numbers or values."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data.files import Table

_WHOLE = re.compile(r"0|-?[1-9]\d*")
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a data set: `numbers` maps a label's word to its class, `note` says what was assumed."""

    names: tuple[str, ...]
    numbers: dict[str, int]
    note: str | None = None


def regression_values(table: Table, column: str) -> np.ndarray:
    """The column as float32 [rows].

    Raises:
      ValueError: a value that is not a finite number, with its place.
    """
    values = np.empty(len(table), np.float32)
    for row, value in enumerate(table.columns[column]):
        number = _number(value)
        if not abs(number) <= _LARGEST:
            raise ValueError(
                f"{table.where(row)}: {column}={value!r} is not a finite number, which regression needs; correct it"
            )
        values[row] = number
    return values


def find_classes(table: Table, column: str, names: Sequence[str]) -> Classes:
    """The classes of the training rows.

    With names, each label is a name, or, if not all are names, an index into them. Without names, whole numbers count
    from 0, and other words are numbered in sorted order, which the note says.

    Args:
      table: the training rows.
      column: the label column.
      names: class names in order; empty if not known.

    Raises:
      ValueError: labels that are neither, or fewer than two classes.
    """
    words = label_words(table, column)
    distinct = set(words)
    if len(distinct) < 2:
        raise ValueError(f"every {column} of {table.source} is {words[0]!r}; classification needs two classes or more")
    whole = all(map(_WHOLE.fullmatch, distinct))
    if not names and not whole:
        ordered = tuple(sorted(distinct))
        mapping = _listed([f"{number} = {name}" for number, name in enumerate(ordered)])
        note = f"{column}: words numbered in sorted order: {mapping} (data.label_names sets another)"
        return Classes(ordered, {name: number for number, name in enumerate(ordered)}, note)
    if not names:
        names = _counted_names(table, column, words)
    by_name = not whole or distinct <= set(names)
    numbers = {name if by_name else str(number): number for number, name in enumerate(names)}
    _check_known(table, column, words, numbers, names)
    absent = [name for word, name in zip(numbers, names, strict=True) if word not in distinct]
    note = f"{column}: no row of {table.source} has class {_listed(absent)}" if absent else None
    return Classes(tuple(names), numbers, note)


def class_numbers(table: Table, column: str, classes: Classes) -> np.ndarray:
    """The column as int32 [rows].

    Raises:
      ValueError: a label outside the classes, with its place.
    """
    words = label_words(table, column)
    _check_known(table, column, words, classes.numbers, classes.names)
    return np.array([classes.numbers[word] for word in words], np.int32)


def label_words(table: Table, column: str) -> list[str]:
    """Each label as a word: "neg", "1", "true".

    Raises:
      ValueError: a label that is missing, or a fraction, a list or the like, with its place.
    """
    words: list[str] = []
    for row, value in enumerate(table.columns[column]):
        if value is None or value == "":
            raise ValueError(f"{table.where(row)}: {column} is empty; give every row a label")
        if not isinstance(value, str | int):
            remedy = "write whole numbers or names, or set model.task='regression'"
            raise ValueError(f"{table.where(row)}: {column}={value!r} is neither a whole number nor a name; {remedy}")
        words.append(value if isinstance(value, str) else str(value).lower())
    return words


def _counted_names(table: Table, column: str, words: Sequence[str]) -> tuple[str, ...]:
    """Names "0", "1", ... up to the largest number in use."""
    count = max(map(int, words)) + 1
    if count > len(words):
        raise ValueError(
            f"{column} of {table.source} reaches {count - 1} in {len(words)} rows; "
            "if it is a number to predict, set model.task='regression'; else list the classes in data.label_names"
        )
    return tuple(map(str, range(count)))


def _check_known(
    table: Table, column: str, words: Sequence[str], numbers: dict[str, int], names: Sequence[str]
) -> None:
    for row, word in enumerate(words):
        if word in numbers:
            continue
        problem = f"is not one of the {len(names)} classes {_listed(names)}; correct it, or list it in data.label_names"
        if word == "-1":
            problem = "is Hugging Face's mark of a hidden label; choose a labelled split (data.validation_split)"
        raise ValueError(f"{table.where(row)}: {column}={word!r} {problem}")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan
