"""Conversations out of files and hub data sets, held-out rows and limits; oracle of the draw is datasets itself."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from train.config.schema import DataConfig
from train.data.instructions import load_instructions

ROWS = [
    {"instruction": f"Add {n} and {n}.", "input": "twice" if n % 3 else "", "output": f"{2 * n}"} for n in range(23)
]


def write(path, rows):
    kind = path.suffix
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, rows[0])
            table.writeheader()
            table.writerows(rows)
    return str(path)


def content(conversations):
    return [(one.turns[0].text, one.context, one.turns[1].text) for one in conversations]


def expected(rows):
    return [(row["instruction"], row["input"], row["output"]) for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files_of_every_kind_give_the_same_conversations(tmp_path, kind):
    train = write(tmp_path / f"train.{kind}", ROWS[:17])
    held_out = write(tmp_path / f"held_out.{kind}", ROWS[17:])
    read = load_instructions(DataConfig(train=train, validation=held_out))
    assert content(read.train) == expected(ROWS[:17])
    assert content(read.validation) == expected(ROWS[17:])
    assert read.notes == (f"{train}: rows of format alpaca",)
    unit, first = ("line", {"jsonl": 1, "csv": 2}[kind]) if kind in ("jsonl", "csv") else ("row", 1)
    assert read.train[2].place == f"{train} {unit} {first + 2}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_turns_survive_a_file(tmp_path, kind):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"{n}"}]} for n in range(3)
    ]
    path = write(tmp_path / f"talk.{kind}", rows)
    read = load_instructions(DataConfig(train=path, validation=path))
    assert [one.turns[1].text for one in read.train] == ["0", "1", "2"]
    assert read.train == read.validation


def test_held_out_rows_are_drawn_as_datasets_draws_them(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    read = load_instructions(DataConfig(train=path), held_out=5)
    theirs = datasets.Dataset.from_list(ROWS).train_test_split(test_size=5, shuffle=True, seed=42)
    assert content(read.train) == expected(theirs["train"])
    assert content(read.validation) == expected(theirs["test"])
    assert "5 rows drawn to be held out (seed 42)" in read.notes[1]
    other = load_instructions(DataConfig(train=path), held_out=5, seed=7)
    assert content(other.validation) != content(read.validation)


@pytest.mark.parametrize("count", [0, 23, 24])
def test_holding_out_all_or_nothing_is_refused(tmp_path, count):
    path = write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match=rf"^{count} rows can't be held out of the 23 of "):
        load_instructions(DataConfig(train=path), held_out=count)


def test_limits_take_the_first_rows_and_say_so(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    read = load_instructions(DataConfig(train=path, validation=path, train_limit=4, eval_limit=30))
    assert (content(read.train), len(read.validation)) == (expected(ROWS[:4]), 23)
    assert read.notes[1:] == ("first 4 of 23 rows taken (data.train_limit)",)


def test_a_bad_row_of_the_held_out_file_is_found_too(tmp_path):
    train = write(tmp_path / "train.jsonl", ROWS)
    held_out = write(tmp_path / "held_out.jsonl", [ROWS[0], {"instruction": "a", "output": ""}])
    with pytest.raises(ValueError, match=r"held_out\.jsonl line 2: output is an empty response"):
        load_instructions(DataConfig(train=train, validation=held_out))


def test_an_unknown_format_is_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match="no format 'llama' of instruction data; choose from alpaca, sharegpt"):
        load_instructions(DataConfig(train=path, validation=path), form="llama")


@pytest.fixture
def hub(monkeypatch):
    """The hub with one data set, which has a training split alone, as yahma/alpaca-cleaned has."""
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), empty=datasets.Dataset.from_list([]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: {("some/alpaca", None): splits}[name, subset])
    return datasets


@pytest.mark.usefixtures("hub")
def test_rows_of_the_hub_are_read_and_held_out():
    read = load_instructions(DataConfig(name="some/alpaca"), held_out=5)
    assert (len(read.train), len(read.validation)) == (18, 5)
    assert sorted(content([*read.train, *read.validation])) == sorted(expected(ROWS))
    assert read.train[0].place.startswith("some/alpaca train row ")


@pytest.mark.usefixtures("hub")
def test_a_split_that_is_not_there_or_empty_is_refused():
    with pytest.raises(
        ValueError, match=r"no split 'validation'; splits there: train, empty; set data\.validation_split"
    ):
        load_instructions(DataConfig(name="some/alpaca"))
    with pytest.raises(ValueError, match=r"some/alpaca empty holds no rows"):
        load_instructions(DataConfig(name="some/alpaca", validation_split="empty"))
