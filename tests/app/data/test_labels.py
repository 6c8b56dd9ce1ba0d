"""Labels: what becomes a class number, what becomes a value, and what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.files import Table
from train.data.labels import class_numbers, find_classes, regression_values


def table(*labels: object, source: str = "a.csv") -> Table:
    return Table(source, {"label": list(labels)}, "line", range(2, 2 + len(labels)))


@pytest.mark.parametrize(
    ("labels", "names", "expected", "numbers", "note"),
    [
        ([1, 0, 1], (), ("0", "1"), [1, 0, 1], None),
        (["1", "0", "1"], (), ("0", "1"), [1, 0, 1], None),
        ([0, 2, 2], (), ("0", "1", "2"), [0, 2, 2], "label: no row of a.csv has class 1"),
        (["pos", "neg", "pos"], (), ("neg", "pos"), [1, 0, 1], "sorted order: 0 = neg, 1 = pos (data.label_names"),
        ([True, False], (), ("false", "true"), [1, 0], "0 = false, 1 = true"),
        (["10", "9", "x"], (), ("10", "9", "x"), [0, 1, 2], "0 = 10, 1 = 9, 2 = x"),
        (["01", "02"], (), ("01", "02"), [0, 1], "0 = 01, 1 = 02"),
        (["pos", "neg"], ("pos", "neg"), ("pos", "neg"), [0, 1], None),
        ([1, 0, 1], ("neg", "pos"), ("neg", "pos"), [1, 0, 1], None),
        ([1, 2, 3], ("1", "2", "3"), ("1", "2", "3"), [0, 1, 2], None),
        ([-1, 1], ("-1", "1"), ("-1", "1"), [0, 1], None),
        ([0, 1], ("a", "b", "c"), ("a", "b", "c"), [0, 1], "label: no row of a.csv has class c"),
        (["b", "a"], ("a", "c", "b"), ("a", "c", "b"), [2, 0], "label: no row of a.csv has class c"),
    ],
)
def test_classes(labels, names, expected, numbers, note):
    rows = table(*labels)
    classes = find_classes(rows, "label", names)
    assert classes.names == expected
    found = class_numbers(rows, "label", classes)
    assert (found.tolist(), found.dtype) == (numbers, np.int32)
    assert classes.note is None if note is None else note in str(classes.note)


@given(st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=9).filter(lambda words: len(set(words)) > 1))
def test_a_words_class_has_its_name(words):
    words = [f"_{word}" for word in words]
    rows = table(*words)
    classes = find_classes(rows, "label", ())
    assert [classes.names[number] for number in class_numbers(rows, "label", classes)] == words
    assert list(classes.names) == sorted(set(words))


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, -1], (), "a.csv line 4: label='-1' is Hugging Face's mark of a hidden label; choose a labelled split"),
        ([0, 1, -2], (), "a.csv line 4: label='-2' is not one of the 2 classes 0, 1; correct it, or list it"),
        ([0, 1, 2], ("a", "b"), "a.csv line 4: label='2' is not one of the 2 classes a, b"),
        (["a", "x"], ("a", "b"), "a.csv line 3: label='x' is not one of"),
        ([0, 1, 7], (), "reaches 7 in 3 rows; if it is a number to predict, set model.task='regression'; else list"),
        ([1, 1], (), "every label of a.csv is '1'; classification needs two classes or more"),
        ([0, None], (), "a.csv line 3: label is empty; give every row a label"),
        (["a", ""], (), "a.csv line 3: label is empty"),
        (
            [0, 1.0],
            (),
            "a.csv line 3: label=1.0 is neither a whole number nor a name; write whole numbers or names, or",
        ),
        ([0, [1]], (), "a.csv line 3: label=[1] is neither"),
    ],
)
def test_training_labels_that_are_refused(labels, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_classes(table(*labels), "label", names)


def test_held_out_labels_must_be_known():
    classes = find_classes(table("pos", "neg"), "label", ())
    with pytest.raises(ValueError, match=r"b.csv line 3: label='meh' is not one of the 2 classes neg, pos"):
        class_numbers(table("neg", "meh", source="b.csv"), "label", classes)
    declared = find_classes(table(0, 1), "label", ("a", "b", "c"))
    assert class_numbers(table(2), "label", declared).tolist() == [2]


def test_many_classes_are_listed_in_part():
    note = find_classes(table(*(f"c{number:02}" for number in range(77))), "label", ()).note
    assert "8 = c08, 9 = c09 and 67 more (data.label_names" in str(note)


def test_regression_values():
    found = regression_values(table(1, 2.5, "-3e-1", "4"), "label")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([1, 2.5, -0.3, 4], np.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "nan", "three", "", None, True, [1.0], 1e39, 10**400])
def test_values_that_are_no_finite_number(bad):
    with pytest.raises(ValueError, match=r"a\.csv line 3: label=.* is not a finite number, which regression needs"):
        regression_values(table(0.5, bad), "label")
