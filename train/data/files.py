"""Rows of local JSONL, JSON, CSV, TSV and Parquet files, column by column, each row with its place for messages."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.readers import READERS, Part, bytes_of_part
from train.hosts.shares import ALONE, Share

_SAMPLES, _SAMPLE = 64, 4096  # pieces of a file, and their bytes, that processes compare


@dataclasses.dataclass(frozen=True)
class Table:
    """Some columns of a file or of a hub split. `unit` and `numbers` say where a row stands: "line" 7 of a file."""

    source: str
    columns: dict[str, list[Any]]
    unit: str
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, row: int) -> str:
        """The place of a row, for an error.

        >>> Table("a.csv", {"text": ["x"]}, "line", [2]).where(0)
        'a.csv line 2'
        """
        return f"{self.source} {self.unit} {self.numbers[row]}"


def find_rows(path: str | Path, share: Share = ALONE) -> Part:
    """The rows of a local file, whose suffix tells the format; or this process's part.

    Raises:
      ValueError: no such file, an unknown suffix, or, in several processes, files that differ.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is of no known format; give a file that ends in {', '.join(READERS)}")
    share.together(lambda: _require_file(path))
    share.agree(str(path), lambda: _fingerprint(path))
    lines = share.before(lambda: bytes_of_part(path, share)[1].count(b"\n")) if path.suffix.lower() == ".jsonl" else 0
    return Part(path, share, lines)


def read_table(path: str | Path, columns: Sequence[str], share: Share = ALONE) -> Table:
    """The named columns of a local file, or of this process's part of its rows.

    CSV and TSV have a header and give strings; TSV has no quoting, as tab-separated values are defined (IANA) and GLUE
    ships them. Text files are UTF-8.

    Raises:
      ValueError: no such file, an unknown suffix, a bad line, a missing column, no rows; file and line are named.
    """
    part = find_rows(path, share)
    table = share.together(lambda: _columns(part, columns))
    if not sum(share.gather(lambda: len(table))):
        raise no_rows(path)
    return table


def _columns(part: Part, columns: Sequence[str]) -> Table:
    values: dict[str, list[Any]] = {column: [] for column in columns}
    numbers: list[int] = []
    for number, record in part.rows():
        for column in columns:
            if column not in record:
                raise missing_column(f"{part.path} {part.unit} {number}", column, record)
            values[column].append(record[column])
        numbers.append(number)
    return Table(str(part.path), values, part.unit, numbers)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"no file at {path}; paths are relative to the current folder {Path.cwd()}")


def _fingerprint(path: Path) -> list[Any]:
    """A file's size and the digest of pieces of it: what tells files apart without reading them."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as stream:
        for piece in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE) * piece // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return [size, digest.hexdigest()]


def no_rows(path: str | Path) -> ValueError:
    """The error for a file without rows."""
    return ValueError(f"{path} holds no rows; give a file with at least one")


def missing_column(place: str, column: str, there: Iterator[str] | Sequence[str] | dict[str, Any]) -> ValueError:
    """The error for a column that is not there; it lists those that are."""
    return ValueError(
        f"{place} has no column {column!r}; columns there: {', '.join(there)}; set data.text or data.label"
    )
