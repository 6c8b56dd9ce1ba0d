"""Data sets whole: local files, hub data sets and GLUE, and what is refused before training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from train.config.schema import DataConfig
from train.config.tasks import GLUE, glue_task
from train.data.labelled import load_examples

TRAIN = [("good", 1), ("bad", 0), ("fine", 1)]
HELD_OUT = [("poor", 0), ("great", 1)]


def local(folder: Path, train: list, held_out: list, **settings) -> DataConfig:
    for name, rows in (("train", train), ("held", held_out)):
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return DataConfig(train=str(folder / "train.jsonl"), validation=str(folder / "held.jsonl"), **settings)


def hub(monkeypatch, **splits: datasets.Dataset) -> list[tuple]:
    """Puts these splits in the hub's place; returns the list of what is asked of it."""
    asked: list[tuple] = []

    def load_dataset(*names):
        asked.append(names)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_local_files(tmp_path):
    dataset = load_examples(local(tmp_path, TRAIN, HELD_OUT), "classification")
    assert dataset.train.texts == (["good", "bad", "fine"],)
    assert dataset.validation.texts == (["poor", "great"],)
    assert dataset.train.labels.tolist() == [1, 0, 1]
    assert dataset.validation.labels.tolist() == [0, 1]
    assert (dataset.label_names, dataset.num_labels, dataset.notes) == (("0", "1"), 2, ())
    assert (len(dataset.train), len(dataset.validation)) == (3, 2)


def test_rows_held_back_are_evaluated_on_and_left_out_of_training(tmp_path):
    rows = [(f"row {number}", number % 2) for number in range(17)]
    dataset = load_examples(local(tmp_path, rows, HELD_OUT, held_back=5, train_limit=7), "classification")
    (train,), (held,) = dataset.train.texts, dataset.validation.texts
    assert (len(train), len(held)) == (7, 5)
    assert not {*train} & {*held}
    assert {*train, *held} < {text for text, _ in rows}
    both = zip([*train, *held], [*dataset.train.labels, *dataset.validation.labels], strict=True)
    assert {*both} < {*rows}
    assert dataset.notes == (
        f"{tmp_path / 'train.jsonl'}: 5 rows held back and evaluated on (data.held_back)",
        f"{tmp_path / 'train.jsonl'}: first 7 of 12 rows taken (data.train_limit)",
    )
    with pytest.raises(ValueError, match=r"data\.held_back=17 leaves none of 17 rows"):
        load_examples(local(tmp_path, rows, HELD_OUT, held_back=17), "classification")


def test_files_may_hold_a_glue_task(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": k % 2} for k in range(3)]
    for name in ("train", "held"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "held.jsonl")}
    assert load_examples(DataConfig(name="glue/rte", **files), "classification").train.texts == (["a"] * 3, ["b"] * 3)


def test_regression(tmp_path):
    dataset = load_examples(local(tmp_path, [("a", 0.5), ("b", 3)], [("c", -1)]), "regression")
    assert (dataset.num_labels, dataset.label_names) == (1, ())
    assert dataset.train.labels.dtype == dataset.validation.labels.dtype == np.float32
    assert (dataset.train.labels.tolist(), dataset.validation.labels.tolist()) == ([0.5, 3.0], [-1.0])


def test_what_was_assumed_is_said(tmp_path):
    config = local(
        tmp_path, [("a", "neg"), (" ", "pos"), ("c", "pos")], [("d", "pos"), ("e", "neg")], train_limit=2, eval_limit=2
    )
    dataset = load_examples(config, "classification")
    assert dataset.train.texts == (["a", " "],)
    assert dataset.train.labels.tolist() == [0, 1]
    assert len(dataset.validation) == 2
    assert dataset.notes == (
        f"{config.train}: 1 empty texts in text",
        "label: words numbered in sorted order: 0 = neg, 1 = pos (data.label_names sets another)",
        f"{config.train}: first 2 of 3 rows taken (data.train_limit)",
    )


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ([("a", 0), (None, 1)], HELD_OUT, "train.jsonl line 2: text=None is not text; give every row a string"),
        (TRAIN, [("a", 0), (7, 1)], "held.jsonl line 2: text=7 is not text"),
        (TRAIN, [("a", 0), ("b", 2)], "held.jsonl line 2: label='2' is not one of the 2 classes 0, 1"),
        (TRAIN, [("a", 0), ("b", -1)], "held.jsonl line 2: label='-1' is Hugging Face's mark of a hidden label"),
        (TRAIN, [], "held.jsonl holds no rows"),
    ],
)
def test_rows_that_are_refused(tmp_path, train, held_out, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_examples(local(tmp_path, train, held_out), "classification")


def test_a_limit_does_not_hide_a_bad_row(tmp_path):
    with pytest.raises(ValueError, match="line 2: label='nan' is not a finite number"):
        load_examples(local(tmp_path, [("a", 1), ("b", "nan")], [("c", 1)], train_limit=1), "regression")


@pytest.mark.parametrize("name", list(GLUE))
def test_glue_by_its_short_name(monkeypatch, name):
    task = GLUE[name]
    features = datasets.Features({column: datasets.Value("string") for column in (*task.text, "surplus")})
    names = [f"class {number}" for number in range(2)]
    features["label"] = datasets.Value("float32") if task.task == "regression" else datasets.ClassLabel(names=names)
    rows = [{column: f"{column} {number}" for column in features} | {"label": number} for number in range(2)]
    split = datasets.Dataset.from_list(rows, features=features)
    asked = hub(monkeypatch, train=split, **{task.validation_split: split})
    dataset = load_examples(DataConfig(name=f"glue/{name}"), task.task)
    assert asked == [("nyu-mll/glue", name)]
    assert dataset.train.texts == tuple([f"{column} 0", f"{column} 1"] for column in task.text)
    assert dataset.validation.labels.tolist() == [0, 1]
    assert dataset.label_names == (() if task.task == "regression" else tuple(names))


def test_any_hub_data_set(monkeypatch):
    split = datasets.Dataset.from_dict({"premise": ["a", "b"], "claim": ["c", "d"], "gold": ["yes", "no"]})
    asked = hub(monkeypatch, train=split, test=split)
    settings = {"name": "me/set", "subset": "small", "text": ("premise", "claim"), "label": "gold"}
    dataset = load_examples(
        DataConfig(**settings, validation_split="test", label_names=("yes", "no")), "classification"
    )
    assert asked == [("me/set", "small")]
    assert dataset.train.texts == (["a", "b"], ["c", "d"])
    assert dataset.train.labels.tolist() == [0, 1]
    with pytest.raises(
        ValueError, match=r"me/set has no split 'validation'; splits there: train, test; set data\.valid"
    ):
        load_examples(DataConfig(**settings), "classification")
    with pytest.raises(ValueError, match="me/set train has no column 'text'; columns there: premise, claim, gold"):
        load_examples(DataConfig(name="me/set", label="gold", validation_split="test"), "classification")
    hub(monkeypatch, train=split.select([]), test=split)
    with pytest.raises(ValueError, match="me/set train holds no rows"):
        load_examples(DataConfig(**settings, validation_split="test"), "classification")


def test_hidden_labels_of_a_hub_split(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    train = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
    test = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [-1, -1]}, features=features)
    hub(monkeypatch, train=train, test=test)
    with pytest.raises(ValueError, match="me/set test row 1: label='-1' is Hugging Face's mark of a hidden label"):
        load_examples(DataConfig(name="me/set", validation_split="test"), "classification")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("boom"),
            "the Hugging Face hub is not in reach for 'nyu-mll/glue'; check the network, or give local",
        ),
        (
            FileNotFoundError("no\nsuch set"),
            "'nyu-mll/glue' can't be loaded; check data.name and data.subset: no such set",
        ),
        (ValueError("pick a config:\n a, b"), "can't be loaded; check data.name and data.subset: pick a config: a, b"),
        (
            datasets.exceptions.DatasetGenerationError("broken"),
            "can't be loaded; check data.name and data.subset: broken",
        ),
    ],
)
def test_a_hub_that_fails_is_told_in_one_line(monkeypatch, error, message):
    def load_dataset(*names):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_examples(DataConfig(name="glue/rte"), "classification")
    assert "\n" not in str(caught.value)


def test_the_hub_out_of_reach():
    # The suite runs with HF_HUB_OFFLINE=1: this is the library's own error, not one of ours.
    with pytest.raises(ValueError, match="the Hugging Face hub is not in reach for 'nobody/nothing-of-this-name'"):
        load_examples(DataConfig(name="nobody/nothing-of-this-name"), "classification")


def test_glue_columns_and_splits_are_the_hubs():
    pair = ("sentence1", "sentence2")
    assert {name: task.text for name, task in GLUE.items()} == {
        "cola": ("sentence",), "mnli": ("premise", "hypothesis"), "mrpc": pair, "qnli": ("question", "sentence"),
        "qqp": ("question1", "question2"), "rte": pair, "sst2": ("sentence",), "stsb": pair, "wnli": pair,
    }  # fmt: skip
    assert {task.validation_split for name, task in GLUE.items() if name != "mnli"} == {"validation"}
    assert GLUE["mnli"].validation_split == "validation_matched"
    assert [name for name, task in GLUE.items() if task.task == "regression"] == ["stsb"]


def test_glue_names():
    assert glue_task("glue/mnli") == GLUE["mnli"]
    assert glue_task("nyu-mll/glue") is glue_task(None) is None
    with pytest.raises(ValueError, match=r"data\.name='glue/ax' is not a GLUE task; choose glue/cola, "):
        glue_task("glue/ax")
