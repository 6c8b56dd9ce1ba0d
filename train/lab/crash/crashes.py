"""`python -m train crash-test`: kills runs at random moments, resumes them, compares them with an unkilled one."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import tyro
from rich.console import Console

from train.config.run_config import RunConfig, from_toml, to_toml
from train.config.schema import OutputConfig
from train.lab.crash.ends import differences, temporary_entries
from train.run_folder.errors import RunError
from train.run_folder.log import FILE_NAME, replace_text

_POLL = 0.001  # seconds between two looks at the folder of checkpoints
_SAVING = 0.1  # a kill during a save comes within this many seconds of the save's first sign

Process: TypeAlias = "subprocess.Popen[bytes]"
# Waits for the moment of a kill, or for the end of the process if that is sooner.
Moment: TypeAlias = "Callable[[Process, _Trial, np.random.Generator], None]"


@dataclasses.dataclass(frozen=True)
class Options:
    """Kill a run with SIGKILL at random moments, from its start, in training or in a save; resume it; compare.

    Further options are those of `run`. output.folder gets uninterrupted/ and, for each end that differs, killed-N/.
    """

    recipe: Annotated[str, tyro.conf.Positional]
    """The run's recipe."""
    kills: int = 30
    """How many runs to kill, one after another."""
    seed: int = 0
    """Seed of the moments."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """One killed run: whether a write was under way, whether a checkpoint existed, and what differs at its end."""

    writing: bool
    saved: bool
    differences: list[str]

    def __str__(self) -> str:
        moment = "in a write" if self.writing else "between writes"
        since = "" if self.saved else ", before the first checkpoint"
        return f"killed {moment}{since}: {'; '.join(self.differences) or 'the end is bit-identical'}"


def crash_test(words: Sequence[str]) -> int:
    """Runs the test; returns the exit code.

    Raises:
      ValueError: a bad recipe or option, or the folder exists already.
      RunError: a run failed, or its end differs from that of the uninterrupted one.
    """
    options, overrides = tyro.cli(
        Options, args=list(words), prog="python -m train crash-test", return_unknown_args=True, use_underscores=True
    )
    if options.kills < 1:
        raise ValueError(f"--kills={options.kills} must be at least 1")
    config = from_toml(options.recipe, overrides)
    place = Path(config.output.folder)
    if place.exists():
        raise ValueError(f"{place} exists already; choose an --output.folder that does not exist yet")
    console, rng = Console(), np.random.default_rng(options.seed)
    reference = _Trial(place / "uninterrupted", config)
    spent = _Spent.measure(reference)
    console.print(
        f"uninterrupted: {spent.whole:.1f} s, {spent.whole - spent.before:.1f} s of it training", highlight=False
    )
    moments = (spent.in_training, spent.in_a_save, spent.anywhere)
    kills = []
    for number in range(options.kills):
        trial = _Trial(place / f"killed-{number + 1}", config)
        kills.append(_kill_and_resume(trial, reference, moments[number % 3], rng))
        console.print(f"{number + 1} of {options.kills}: {kills[-1]}", highlight=False, soft_wrap=True)
    return _conclude(kills, console)


class _Trial:
    """A run in a folder of its own, with its recipe and its output beside it."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.recipe, self.log = folder.with_suffix(".toml"), folder.with_suffix(".log")
        self.checkpoints = folder / "checkpoints"
        self.config = dataclasses.replace(config, output=OutputConfig(str(folder)))

    def start(self) -> Process:
        """Starts the run, or resumes it if it has checkpoints."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.recipe, to_toml(self.config))
        resume = ["--resume"] if self.checkpoints.exists() else []
        command = [sys.executable, "-m", "train", "run", str(self.recipe), *resume]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def require_success(self, process: Process) -> None:
        """Waits for the end of a process of this run.

        Raises:
          RunError: it failed.
        """
        if process.wait():
            said = self.log.read_text(encoding="utf-8", errors="replace").strip()[-300:]
            raise RunError(f"the run in {self.folder} failed, see {self.log}: {said}")

    def has_begun(self) -> bool:
        """Whether the run has read its model and its data."""
        return (self.folder / FILE_NAME).exists()

    def has_checkpoint(self) -> bool:
        """Whether a checkpoint is complete."""
        return any(entry.name.isdigit() for entry in self.checkpoints.glob("*"))

    def saves_under_way(self) -> set[str]:
        """The names of checkpoints that are not complete yet."""
        return {entry.name for entry in self.checkpoints.glob("*tmp*")}

    def remove(self) -> None:
        """Deletes all of it."""
        for path in (self.recipe, self.log):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Spent:
    """Seconds of the uninterrupted run: before its training began, and in all. Its methods wait for a random moment."""

    before: float
    whole: float

    @classmethod
    def measure(cls, reference: _Trial) -> _Spent:
        """Runs and times the reference."""
        began = time.monotonic()
        process = reference.start()
        _wait_for(process, reference.has_begun)
        before = time.monotonic() - began
        reference.require_success(process)
        return cls(before, time.monotonic() - began)

    def anywhere(self, process: Process, trial: _Trial, rng: np.random.Generator) -> None:
        """Any moment from the start of the process."""
        time.sleep(rng.uniform(0, self.whole))

    def in_training(self, process: Process, trial: _Trial, rng: np.random.Generator) -> None:
        """Any moment of training."""
        _wait_for(process, trial.has_begun)
        time.sleep(rng.uniform(0, self.whole - self.before))

    def in_a_save(self, process: Process, trial: _Trial, rng: np.random.Generator) -> None:
        """A moment in or just after one of the first three saves."""
        which, seen = int(rng.integers(1, 4)), set()

        def begun() -> bool:
            seen.update(trial.saves_under_way())
            return len(seen) >= which

        _wait_for(process, begun)
        time.sleep(rng.uniform(0, _SAVING))


def _wait_for(process: Process, condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(_POLL)


def _kill_and_resume(trial: _Trial, reference: _Trial, moment: Moment, rng: np.random.Generator) -> Kill:
    """Kills one run at a moment, then resumes it to its end."""
    while not _killed(trial, moment, rng):
        trial.remove()  # it ended before the kill: try again
    writing, saved = bool(temporary_entries(trial.folder)), trial.has_checkpoint()
    trial.require_success(trial.start())
    kill = Kill(writing, saved, differences(trial.folder, reference.folder))
    if not kill.differences:
        trial.remove()
    return kill


def _killed(trial: _Trial, moment: Moment, rng: np.random.Generator) -> bool:
    """Starts a run and kills it; False if it ended before that."""
    process = trial.start()
    moment(process, trial, rng)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return not ended


def _conclude(kills: list[Kill], console: Console) -> int:
    """Prints how many ends are equal.

    Raises:
      RunError: not all are.
    """
    equal = sum(not kill.differences for kill in kills)
    writing, early = sum(kill.writing for kill in kills), sum(not kill.saved for kill in kills)
    summary = (
        f"{equal} of {len(kills)} killed runs resumed and ended bit-identical to the uninterrupted one; "
        f"{writing} were killed in a write, {early} before their first checkpoint"
    )
    if equal < len(kills):
        raise RunError(summary)
    console.print(summary, highlight=False, soft_wrap=True)
    return 0
