"""Local files: five formats give the same rows, and a bad line is named."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.files import Table, read_table

# Text that trips careless readers: separators, quotes, newlines, words that look like missing values or numbers.
TEXTS = ["plain", 'a "quoted", word', "line\nbreak", "NA", "null", "007", "\u2028 \x85 \u00e9", " spaced ", ""]
ROWS = [{"text": text, "label": f"l{number}", "other": number} for number, text in enumerate(TEXTS)]


def write_rows(path: Path) -> None:
    frame = pandas.DataFrame(ROWS)
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case ".csv":
            frame.to_csv(path, index=False, encoding="utf-8-sig")
        case ".parquet":
            frame.to_parquet(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    write_rows(path)
    table = read_table(path, ("text", "label"))
    assert table.columns == {"text": TEXTS, "label": [f"l{number}" for number in range(len(TEXTS))]}
    assert len(table) == len(TEXTS)
    expected = {".jsonl": "line 3", ".json": "row 2", ".csv": "line 3", ".parquet": "row 2"}[suffix]
    assert table.where(1) == f"{path} {expected}"


def test_tsv_takes_quotes_as_they_are(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\n"open quote\t1\nit\'s "so"\t0\n', encoding="utf-8")
    assert read_table(path, ("text", "label")).columns == {"text": ['"open quote', 'it\'s "so"'], "label": ["1", "0"]}


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_what_csv_and_json_write_is_read_back(folder, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("a", "b"), *rows])
    (folder / "rows.csv").write_bytes(text.getvalue().encode())
    lines = [json.dumps({"a": a, "b": b}, ensure_ascii=False) for a, b in rows]
    (folder / "rows.jsonl").write_bytes("\r\n".join(lines).encode())
    expected = {"a": [a for a, _ in rows], "b": [b for _, b in rows]}
    assert read_table(folder / "rows.csv", ("a", "b")).columns == expected
    assert read_table(folder / "rows.jsonl", ("a", "b")).columns == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "x"\n', "a.jsonl line 2 is not JSON: Expecting ',' delimiter"),
        ("a.jsonl", '{"text": "x", "label": 0}\n["x"]\n', "a.jsonl line 2 is not a JSON object; write one {...} a"),
        ("a.jsonl", '{"text": "x", "label": 0}\n\n{"text": "x"}\n', "line 3 has no column 'label'; columns there"),
        ("a.jsonl", "\n", "a.jsonl holds no rows; give a file with at least one"),
        ("a.json", "{}", "a.json does not hold a list; write the rows as [{...}, {...}]"),
        ("a.json", '[\n{"text": "x" "label"}]', "a.json line 2 is not JSON: Expecting ',' delimiter (column 14)"),
        ("a.json", '{"text": "x"}\n{"text": "y"}', "Extra data (column 1); with one object a line, name it .jsonl"),
        ("a.json", "[1]", "a.json row 1 is not a JSON object"),
        ("a.csv", "text,label\nx,0\ny,z,1\n", "a.csv line 3 has 3 fields where the header has 2; quote text"),
        ("a.csv", "text,label\nx\n", "a.csv line 2 has 1 fields where the header has 2"),
        ("a.csv", 'text,label\n"x"y,0\n', "a.csv line 2 is not CSV: ',' expected after '\"'; check its quotes"),
        ("a.csv", 'text,label\n"x,0\n', "a.csv line 2 is not CSV: unexpected end of data; check its quotes"),
        ("a.csv", "text,label,text\nx,0,y\n", "a.csv line 1: header repeats text; rename columns"),
        ("a.csv", "sentence,label\nx,0\n", "has no column 'text'; columns there: sentence, label; set data.text"),
        ("a.csv", "text,label\n", "a.csv holds no rows"),
        ("a.csv", "", "a.csv holds no rows"),
        ("a.csv", b"text,label\nx,0\n\xe9,1\n", "a.csv line 3 is not UTF-8 (byte 15); convert it with iconv"),
        ("a.parquet", "PAR1", "a.parquet can't be read as Parquet: "),
        ("a.txt", "x", "a.txt has no known format; give a file that ends in .jsonl, .json, .csv, .tsv, .parquet"),
    ],
)  # fmt: skip
def test_a_bad_file_names_line_and_remedy(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_table(path, ("text", "label"))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_column_of_parquet_and_a_missing_file(tmp_path):
    path = tmp_path / "a.parquet"
    pandas.DataFrame({"sentence": ["x"], "label": [1]}).to_parquet(path)
    with pytest.raises(ValueError, match="has no column 'text'; columns there: sentence, label"):
        read_table(path, ("text", "label"))
    with pytest.raises(ValueError, match=r"no file at nowhere\.csv; paths are relative to the current folder"):
        read_table("nowhere.csv", ("text",))


def test_where_names_the_row():
    assert Table("glue/rte train", {}, "row", range(1, 4)).where(2) == "glue/rte train row 3"
