"""Checkpoints: trainables, optimizer state, step and notes, by orbax; the latest and the best are kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from melora_jax import TrainState
from train.hosts.hosts import is_first
from train.run_folder.log import replace_text


@dataclasses.dataclass(frozen=True)
class MemberNotes:
    """What a run must remember beside its arrays.

    Attributes:
      config: the run's configuration as TOML text.
      best: the best ranking metric so far, and the step it was seen at.
      waited: evaluations since then, for early stopping.
      diverged: the step at which its loss was not finite; None while it is.
    """

    config: str
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    diverged: int | None = None


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a cohort must remember beside its arrays.

    Attributes:
      members: each run's own.
      seconds: time spent so far.
      unevaluated: a signal stopped the evaluation that was due at this step, and it comes first.
    """

    members: Sequence[MemberNotes]
    seconds: float = 0.0
    unevaluated: bool = False

    @classmethod
    def start(cls, configs: Sequence[str]) -> Self:
        """Those of a cohort that has not begun, from its members' configurations."""
        return cls([MemberNotes(config=config) for config in configs])

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Self:
        """Reads notes, also of earlier versions: a lone run's in one table, or a population's with `diverged` aside."""
        tables = table.get("members", [table])
        ends = table.get("diverged", [one.get("diverged") for one in tables])
        names = {field.name for field in dataclasses.fields(MemberNotes)}
        members = [
            MemberNotes(**{key: value for key, value in one.items() if key in names} | {"diverged": end})
            for one, end in zip(tables, ends, strict=True)
        ]
        return cls(members, table["seconds"], table["unevaluated"])


class Checkpoints:
    """The checkpoints below `folder`, each with notes. A context manager.

    Only what training changes is stored; the frozen base is read from its own checkpoint. A save is complete or absent:
    orbax writes beside and renames, and leftovers of a killed save are removed when the folder is opened again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._best = _BestStep()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(1), self._best]),
            cleanup_tmp_directories=True,
            # Adapters are small: a save that has returned is on disk, and its errors are ours to explain.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def describe_latest(self) -> str:
        """Which checkpoint is left."""
        latest = self.latest()
        return "no checkpoint was written yet" if latest is None else f"the checkpoint of step {latest} is intact"

    def save(self, state: TrainState, notes: Notes, best_step: int | None) -> None:
        """Saves at the state's step; if there is a checkpoint of that step, only its notes are replaced.

        The newest checkpoint and that of `best_step` are kept.

        Raises:
          OSError: the disk refuses. Earlier checkpoints stay.
        """
        step, self._best.step = int(state.step), best_step
        if step in self._manager.all_steps():
            self._note_later(step, notes, best_step)
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)), notes=ocp.args.JsonSave(dataclasses.asdict(notes))
        )
        try:
            self._manager.save(step, args=items)
        except (OSError, ValueError) as error:
            raise OSError(
                f"checkpoint of step {step} could not be written to {self.folder}: {_reason(error)}"
            ) from error

    def _note_later(self, step: int, notes: Notes, best_step: int | None) -> None:
        """The evaluation that a signal stopped has been made after all."""
        if is_first():
            # orbax has no way to change an item; its JSON items are one file.
            replace_text(self.folder / str(step) / "notes" / "metadata", json.dumps(dataclasses.asdict(notes)))
        for other in self.steps():
            if other not in (step, best_step):
                self._manager.delete(other)

    def restore(self, like: TrainState) -> TrainState:
        """The state of the newest checkpoint, as arrays placed like those of `like`.

        Raises:
          ValueError: it does not fit `like`, or is damaged.
        """
        step = self._manager.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"checkpoint {self.folder / str(step)} can't be restored, it is of another model or damaged; "
                f"start again in another --output.folder: {_reason(error)}"
            ) from error
        leaves = [restored["state"][name] for name in _named(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def notes(self) -> Notes | None:
        """Those of the newest checkpoint; None before the first."""
        step = self._manager.latest_step()
        if step is None:
            return None
        restored = self._manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))
        return Notes.from_json(restored["notes"])

    def arrays(self) -> dict[str, np.ndarray]:
        """The newest checkpoint's arrays by name, on the host."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore())
        restored = self._manager.restore(self._manager.latest_step(), args=items)
        return {name: np.asarray(array) for name, array in restored["state"].items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()


@dataclasses.dataclass
class _BestStep(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of one step."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves of a state under readable names, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _reason(error: Exception) -> str:
    """The first line of a library's error, shortened."""
    return " ".join(str(error).split())[:200]
