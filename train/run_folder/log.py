"""A run's metrics.jsonl: one JSON object a line, appended as training goes and safe to read at any moment.

Two kinds of event. Every event has `kind` and `step`; the other keys are numbers, true or false, or text::

    {"kind": "train", "step": 12, "epoch": 0.05, "loss": 0.61, "learning_rate": 4e-4, ..., "seconds": 4.2}
    {"kind": "eval", "step": 235, "epoch": 1.0, "loss": 0.41, "accuracy": 0.851, "seconds": 3.1, "best": true}

`seconds` of a train event is the run's elapsed time so far (resumed parts added up); of an eval event, how long
that evaluation took, and `best` whether it was the best so far.
JSON has no NaN or infinity, so these are written as the strings "NaN", "Infinity" and "-Infinity" (the spelling
of protobuf's JSON) and `read_metrics` turns them back into floats.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

FILE_NAME = "metrics.jsonl"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")

Scalar = bool | int | float | str
Event = dict[str, Scalar]


class MetricsLog:
    """Appends events to `folder`/metrics.jsonl, each flushed as one line, and optionally to TensorBoard.

    Args:
      folder: the run folder; it is created where missing.
      tensorboard: also write scalars to `folder`/tensorboard (needs the extra `melora_jax[tensorboard]`).
      resume_step: the step of the checkpoint from which training resumes. Events of later steps belong to work
        that is about to be done again, so they are dropped, in one atomic rewrite. `None` starts a new log.

    Raises:
      ValueError: a new log where one exists, a log that can't be read, or tensorboardX missing.
      OSError: the disk is full or the folder can't be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsLog(folder) as log:
    ...         log.write({"kind": "train", "step": 1, "loss": float("inf")})
    ...     read_metrics(folder)
    [{'kind': 'train', 'step': 1, 'loss': inf}]
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensorboard: bool = False,
        resume_step: int | None = None,
        unevaluated: bool = False,
    ):
        self.path = Path(folder) / FILE_NAME
        summary_writer = _summary_writer() if tensorboard else None
        self._keep_until(resume_step, unevaluated)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)  # unbuffered: a line that fails is not tried again on close
        self._board = None
        if summary_writer is not None:
            purge_step = None if resume_step is None else resume_step + 1
            self._board = summary_writer(str(self.path.parent / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def _keep_until(self, resume_step: int | None, unevaluated: bool) -> None:
        """Drops the events after `resume_step`, and a torn last line, from an existing log."""
        if not self.path.exists():
            return
        if resume_step is None:
            raise ValueError(
                f"{self.path} holds the metrics of an earlier run; continue that run with --resume, "
                "or choose another folder"
            )
        until = {"eval": resume_step - 1 if unevaluated else resume_step}
        events = read_metrics(self.path.parent)
        kept = [event for event in events if _step(event) <= until.get(str(event["kind"]), resume_step)]
        replace_text(self.path, "".join(_line(event) for event in kept))

    def write(self, event: Mapping[str, Any]) -> None:
        """Appends one event.

        Args:
          event: `kind` (text), `step` (int) and scalars: Python's, NumPy's or JAX's.

        Raises:
          ValueError: `kind` or `step` is missing, or a value is not a scalar; nothing is written then.
          OSError: the disk is full; the events before stay readable.
        """
        scalars = {key: _scalar(key, value) for key, value in event.items()}
        fault = _fault(scalars)
        if fault:
            raise ValueError(f"a metrics event {fault}: {scalars}")
        line = memoryview(_line(scalars).encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            remedy = "free space there and continue with --resume"
            raise OSError(error.errno, f"{error.strerror} while writing metrics; {remedy}", str(self.path)) from error
        if self._board is not None:
            for key, value in scalars.items():
                if key != "step" and not isinstance(value, str):
                    self._board.add_scalar(f"{scalars['kind']}/{key}", value, scalars["step"])

    def close(self) -> None:
        """Closes the files. Closing twice is harmless."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NoLog:
    """In place of a `MetricsLog` where another process writes it."""

    def write(self, event: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes nothing."""


def read_metrics(folder: str | os.PathLike[str]) -> list[Event]:
    """The events of `folder`/metrics.jsonl, in the order in which they were written.

    A last line that was cut off by a crash (no newline, not whole JSON) is left out.

    Raises:
      ValueError: there is no log in `folder`, or another line is not an event; names file and line.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"there is no {FILE_NAME} in {path.parent}; give the folder of a run of `python -m train run`")
    *lines, tail = path.read_bytes().split(b"\n")
    events = [_event(line, path, number) for number, line in enumerate(lines, start=1)]
    if tail:
        with contextlib.suppress(ValueError):
            events.append(_event(tail, path, len(lines) + 1))
    return events


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text as UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path` whole or not at all: a temporary file beside it, synced, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _event(line: bytes, path: Path, number: int) -> Event:
    """One line as an event; an error that names file and line where it is not one."""
    remedy = "repair or delete that line"
    try:
        event = json.loads(line, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{path} line {number} is not JSON ({error}); {remedy}") from error
    fault = _fault(event)
    if fault:
        raise ValueError(f"{path} line {number} {fault}; {remedy}")
    return {key: float(value) if value in _NOT_FINITE else value for key, value in event.items()}


def _fault(event: object) -> str | None:
    """Why `event` is not an event, or None."""
    if not isinstance(event, dict):
        return "is not a JSON object"
    if not isinstance(event.get("kind"), str):
        return 'lacks "kind" (text)'
    step = event.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return 'lacks "step" (an integer from 0)'
    for key, value in event.items():
        if not isinstance(value, Scalar):
            return f'has a "{key}" that is not a number, true, false or text'
    return None


def _step(event: Event) -> int:
    return int(event["step"])


def _line(event: Mapping[str, Scalar]) -> str:
    """`event` as strict JSON and a newline."""
    return json.dumps({key: _encoded(value) for key, value in event.items()}, allow_nan=False) + "\n"


def _encoded(value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _scalar(key: str, value: Any) -> Scalar:
    """A Python scalar from a Python, NumPy or JAX one; reading a JAX value waits for its computation."""
    if isinstance(value, str):
        if value in _NOT_FINITE:
            raise ValueError(f'the metric "{key}" is the text "{value}", which stands for a float; pass the float')
        return value
    array = np.asarray(value)
    if array.shape != () or array.dtype.kind == "O":
        raise ValueError(f'the metric "{key}" has type {type(value).__name__}; pass one number, true, false or text')
    if array.dtype.kind == "b":
        return bool(array)
    return int(array) if array.dtype.kind in "iu" else float(array)


def _refuse_constant(name: str) -> float:
    raise ValueError(f'bare {name}; write "{name}" with quotes')


def _summary_writer() -> type[Any]:
    """tensorboardX.SummaryWriter, or an error that names the extra."""
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError(
            f"TensorBoard events need a package that is missing ({error.name}); "
            "install it with: pip install 'melora_jax[tensorboard]'"
        ) from error
    return SummaryWriter
