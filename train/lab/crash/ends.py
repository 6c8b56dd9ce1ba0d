"""Whether two runs ended alike: every file and array, bit for bit, except for times and the folder's own name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from train.loop.checkpoint import Checkpoints, Notes
from train.run_folder.leftovers import leftovers
from train.run_folder.log import read_metrics

# Equal runs differ in their times, and in config.toml and the report, which name their own folder.
_OF_TIME = ("seconds", "examples_per_second", "tokens_per_second", "memory_bytes")
_OF_PLACE = ("config.toml", "report.html", "metrics.jsonl")


def differences(folder: Path, reference: Path) -> list[str]:
    """How the run in `folder` differs from `reference`, and leftovers of killed writes; empty if they are alike."""
    found = [f"leftover {entry.name}" for entry in temporary_entries(folder)]
    ours, theirs = _files(folder), _files(reference)
    found += [f"{name} exists in only one of the two" for name in sorted(ours.keys() ^ theirs.keys())]
    common = sorted(ours.keys() & theirs.keys() - set(_OF_PLACE))
    found += [f"{name} differs" for name in common if ours[name].read_bytes() != theirs[name].read_bytes()]
    if _events(folder) != _events(reference):
        found.append("metrics.jsonl differs")
    return found + _checkpoint_differences(folder / "checkpoints", reference / "checkpoints")


def temporary_entries(folder: Path) -> list[Path]:
    """Temporary files and folders, of writes under way or killed, in a run's folder."""
    return leftovers(folder) + sorted((folder / "checkpoints").glob("*tmp*"))


def _files(folder: Path) -> dict[str, Path]:
    """The run's files by name, without its checkpoints, whose files contain times and random names."""
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in names.items() if not name.startswith("checkpoints")}


def _events(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key not in _OF_TIME} for event in read_metrics(folder)]


def _checkpoint_differences(folder: Path, reference: Path) -> list[str]:
    with Checkpoints(folder) as ours, Checkpoints(reference) as theirs:
        if ours.steps() != theirs.steps():
            return [f"there are checkpoints of steps {ours.steps()}, not {theirs.steps()}"]
        mine, other = ours.arrays(), theirs.arrays()
        found = [
            f"checkpoint array {name} differs" for name in mine.keys() | other.keys() if not _same(name, mine, other)
        ]
        if _without_time_and_place(ours.notes()) != _without_time_and_place(theirs.notes()):
            found.append("checkpoint notes differ")
    return found


def _without_time_and_place(notes: Notes | None) -> Any:
    return notes and (notes.unevaluated, [dataclasses.replace(member, config="") for member in notes.members])


def _same(name: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    if name not in ours or name not in theirs:
        return False
    one, two = ours[name], theirs[name]
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
