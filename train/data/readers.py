"""Readers of files of rows: JSONL, JSON, CSV, TSV and Parquet, or the part of one that a process reads.

Of JSONL and Parquet that is all that is read. The other formats can't be cut by those who have not read them from their
start: every process reads them, and keeps the rows of its part.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from train.hosts.shares import Share

Row = tuple[int, dict[str, Any]]


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


@dataclasses.dataclass(frozen=True)
class Part:
    """A process's part of a file. `before` is the number of lines before it, where rows are lines."""

    path: Path
    share: Share
    before: int = 0

    @property
    def unit(self) -> str:
        """What numbers count: "line" or "row"."""
        return READERS[self.path.suffix.lower()][0]

    def rows(self) -> Iterator[Row]:
        """The numbered rows.

        Raises:
          ValueError: one that can't be read.
        """
        return READERS[self.path.suffix.lower()][1](self)


def bytes_of_part(path: Path, share: Share) -> tuple[int, bytes]:
    """Where a process's part of a file of lines begins, and its bytes: the lines that begin in its part of them."""
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
            raise ValueError(f"{path} line {number} is no JSON object; write one {{...}} a line")
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
        raise ValueError(f"{path} holds no list; write the rows as [{{...}}, {{...}}]")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path} row {number} is no JSON object; write the rows as [{{...}}, {{...}}]")
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
    """The rows of the groups that hold some of the part."""
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
    """A reader of whole files as one of which only the part's rows are kept."""

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
