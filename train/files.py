"""Rows of local JSONL, JSON, CSV, TSV and Parquet files, column by column, each row with its place for messages."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = tuple[int, dict[str, Any]]


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


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


def read_table(path: str | Path, columns: Sequence[str]) -> Table:
    """The named columns of a local file, whose suffix tells the format.

    CSV and TSV have a header and give strings; TSV has no quoting, as tab-separated values are defined (IANA) and GLUE
    ships them. Text files are UTF-8.

    Raises:
      ValueError: no such file, an unknown suffix, a bad line, a missing column, no rows; file and line are named.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is of no known format; give a file that ends in {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"no file at {path}; paths are relative to the current folder {Path.cwd()}")
    unit, reader = READERS[path.suffix.lower()]
    values: dict[str, list[Any]] = {column: [] for column in columns}
    numbers: list[int] = []
    for number, record in reader(path):
        for column in columns:
            if column not in record:
                raise missing_column(f"{path} {unit} {number}", column, record)
            values[column].append(record[column])
        numbers.append(number)
    if not numbers:
        raise ValueError(f"{path} holds no rows; give a file with at least one")
    return Table(str(path), values, unit, numbers)


def missing_column(place: str, column: str, there: Iterator[str] | Sequence[str] | dict[str, Any]) -> ValueError:
    """The error for a column that is not there; it lists those that are."""
    return ValueError(
        f"{place} has no column {column!r}; columns there: {', '.join(there)}; set data.text or data.label"
    )


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} line {line} is not UTF-8 (byte {error.start}); convert it with iconv") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines(), which also splits at U+2028 and others that JSON strings may hold.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is no JSON object; write one {{...}} a line")
        yield number, record


def _read_json(path: Path) -> Iterator[Row]:
    try:
        records = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        remedy = "; with one object a line, name it .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"{path} line {error.lineno} is not JSON: {error.msg} (column {error.colno}){remedy}"
        ) from None
    if not isinstance(records, list):
        raise ValueError(f"{path} holds no list; write the rows as [{{...}}, {{...}}]")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path} row {number} is no JSON object; write the rows as [{{...}}, {{...}}]")
        yield number, record


def _read_csv(path: Path, dialect: type[csv.Dialect] = csv.excel) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(_read_text(path), newline=""), dialect, strict=True)
    header: list[str] | None = None
    try:
        for fields in lines:
            if not fields:
                continue
            if header is None:
                header = fields
                repeated = sorted({name for name in header if header.count(name) > 1})
                if repeated:
                    raise ValueError(
                        f"{path} line {lines.line_num}: header repeats {', '.join(repeated)}; rename columns"
                    )
                continue
            if len(fields) != len(header):
                shape = f"{len(fields)} fields where the header has {len(header)}"
                raise ValueError(f"{path} line {lines.line_num} has {shape}; quote text that holds the separator")
            yield lines.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path} line {lines.line_num} is not CSV: {error}; check its quotes") from None


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, _Tsv)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        records = (record for batch in batches for record in batch.to_pylist())
        yield from enumerate(records, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} can't be read as Parquet: {' '.join(str(error).split())}; write it again") from None


READERS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    ".jsonl": ("line", _read_jsonl),
    ".json": ("row", _read_json),
    ".csv": ("line", _read_csv),
    ".tsv": ("line", _read_tsv),
    ".parquet": ("row", _read_parquet),
}
