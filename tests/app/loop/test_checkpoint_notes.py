"""Notes beside a checkpoint's arrays: back and forth, and as earlier versions wrote them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from train.loop.checkpoint import MemberNotes, Notes

LONE = {"config": "a", "best": 0.5, "best_step": 10, "waited": 2, "seconds": 3.5, "unevaluated": True}
POPULATION = {
    "members": [
        {"config": "a", "best": 0.5, "best_step": 10, "waited": 1, "seconds": 0.0, "unevaluated": False},
        {"config": "b", "best": None, "best_step": None, "waited": 0, "seconds": 0.0, "unevaluated": False},
    ],
    "diverged": [None, 3],
    "seconds": 3.5,
    "unevaluated": False,
}


@pytest.mark.parametrize(
    ("written", "notes"),
    [
        (LONE, Notes([MemberNotes("a", 0.5, 10, 2)], 3.5, True)),
        (POPULATION, Notes([MemberNotes("a", 0.5, 10, 1), MemberNotes("b", diverged=3)], 3.5)),
    ],
    ids=["a lone run's", "a population's"],
)
def test_notes_of_earlier_versions_are_read(written, notes):
    assert Notes.from_json(written) == notes
    assert Notes.from_json(json.loads(json.dumps(dataclasses.asdict(notes)))) == notes
