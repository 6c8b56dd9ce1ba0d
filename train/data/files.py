"""Rows of local JSONL, JSON, CSV, TSV and Parquet files, or of the part of a file that one process reads.

A process reads only its part of a JSONL or Parquet file. The other formats can't be divided before they are read from
the start: every process reads all of the file and keeps the rows of its part.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.hosts.shares import ALONE, Share

Row = tuple[int, dict[str, Any]]

# Processes compare this many pieces of a file, of this many bytes each.
_SAMPLES, _SAMPLE = 64, 4096


@dataclasses.dataclass(frozen=True)
class Table:
    """Some columns of a file or of a hub split. `unit` and `numbers` name the place of each row: "line" 7 of a file."""

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


@dataclasses.dataclass(frozen=True)
class Part:
    """A process's part of a file. `before` counts the lines before it, where rows are lines."""

    path: Path
    share: Share
    before: int = 0

    @property
    def unit(self) -> str:
        """What the numbers of rows count: "line" or "row"."""
        return READERS[self.path.suffix.lower()][0]

    def rows(self) -> Iterator[Row]:
        """The numbered rows.

        Raises:
          ValueError: a row can't be read.
        """
        return READERS[self.path.suffix.lower()][1](self)


def find_rows(path: str | Path, share: Share = ALONE) -> Part:
    """The rows of a local file, in the format of its suffix, or this process's part of them.

    Raises:
      ValueError: no such file, an unknown suffix, or a file that differs between processes.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} has no known format; give a file that ends in {', '.join(READERS)}")
    share.together(lambda: require_file(path))
    share.agree(str(path), lambda: _fingerprint(path))
    lines = share.before(lambda: bytes_of_part(path, share)[1].count(b"\n")) if path.suffix.lower() == ".jsonl" else 0
    return Part(path, share, lines)


def read_table(path: str | Path, columns: Sequence[str], share: Share = ALONE) -> Table:
    """The named columns of a local file, or of this process's part of its rows.

    CSV and TSV have a header and give strings. TSV has no quoting, as IANA defines it and GLUE ships it. Text files are
    UTF-8.

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


def require_file(path: Path) -> None:
    """Raises ValueError if there is no such file."""
    if not path.is_file():
        raise ValueError(f"no file at {path}; paths are relative to the current folder {Path.cwd()}")


def _fingerprint(path: Path) -> list[Any]:
    """A file's size and the digest of pieces of it, which tell files apart without reading them whole."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as stream:
        for piece in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE) * piece // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return [size, digest.hexdigest()]


def no_rows(path: str | Path) -> ValueError:
    """The error for a file without rows."""
    return ValueError(f"{path} holds no rows; give a file with at least one")


def missing_column(place: str, column: str, there: Iterable[str]) -> ValueError:
    """The error for a missing column, which lists those that exist."""
    return ValueError(
        f"{place} has no column {column!r}; columns there: {', '.join(there)}; set data.text or data.label"
    )


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def bytes_of_part(path: Path, share: Share) -> tuple[int, bytes]:
    """A process's part of a file of lines: its first byte's offset, and the lines that begin in its share of bytes."""
    size = path.stat().st_size
    with path.open("rb") as stream:

        def line_from(place: int) -> int:
            stream.seek(max(0, place - 1))
            return stream.tell() + len(stream.readline()) if place else 0

        start, end = line_from(size * share.number // share.of), line_from(size * (share.number + 1) // share.of)
        stream.seek(start)
        return start, stream.read(end - start)


def _text(path: Path, raw: bytes, before: int = 0, start: int = 0) -> str:
    try:
        return raw.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = before + raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line} is not UTF-8 (byte {start + error.start}); convert it with iconv"
        ) from None


def _read_jsonl(part: Part) -> Iterator[Row]:
    path, before = part.path, part.before
    start, raw = bytes_of_part(path, part.share)
    # Not splitlines(), which also splits at U+2028 and others that JSON strings may hold.
    for number, line in enumerate(_text(path, raw, before, start).split("\n"), start=before + 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is not a JSON object; write one {{...}} a line")
        yield number, record


def _read_json(path: Path) -> Iterator[Row]:
    try:
        records = json.loads(_text(path, path.read_bytes()))
    except json.JSONDecodeError as error:
        remedy = "; with one object a line, name it .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"{path} line {error.lineno} is not JSON: {error.msg} (column {error.colno}){remedy}"
        ) from None
    if not isinstance(records, list):
        raise ValueError(f"{path} does not hold a list; write the rows as [{{...}}, {{...}}]")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path} row {number} is not a JSON object; write the rows as [{{...}}, {{...}}]")
        yield number, record


def _read_csv(path: Path, dialect: type[csv.Dialect] = csv.excel) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(_text(path, path.read_bytes()), newline=""), dialect, strict=True)
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


def _read_parquet(part: Part) -> Iterator[Row]:
    """Reads the row groups that overlap the part, and of these keeps its rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(part.path)
        own, sizes = part.share.cut(file.metadata.num_rows), range(file.num_row_groups)
        ends = list(itertools.accumulate((file.metadata.row_group(group).num_rows for group in sizes), initial=0))
        for group, (start, end) in enumerate(itertools.pairwise(ends)):
            if start >= own.stop or end <= own.start:
                continue
            batches = file.iter_batches(row_groups=[group])
            records = enumerate((record for batch in batches for record in batch.to_pylist()), start=start)
            yield from ((row + 1, record) for row, record in records if row in own)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{part.path} can't be read as Parquet: {reason}; write it again") from None


def _kept(read: Callable[[Path], Iterator[Row]]) -> Callable[[Part], Iterator[Row]]:
    """Turns a reader of whole files into one that keeps only the part's rows."""

    def rows(part: Part) -> Iterator[Row]:
        if part.share.of == 1:
            return read(part.path)
        everything = list(read(part.path))
        own = part.share.cut(len(everything))
        return iter(everything[own.start : own.stop])

    return rows


READERS: dict[str, tuple[str, Callable[[Part], Iterator[Row]]]] = {
    ".jsonl": ("line", _read_jsonl),
    ".json": ("row", _kept(_read_json)),
    ".csv": ("line", _kept(_read_csv)),
    ".tsv": ("line", _kept(_read_tsv)),
    ".parquet": ("row", _read_parquet),
}
