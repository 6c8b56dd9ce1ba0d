"""How far requests are, and how long they will take: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A context manager around the requests.

    Args:
      what: their name.
      total: how many there are.
      console: where to print; standard error by default.
      interval: seconds between lines where that is no terminal.
      clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._interval, self._clock = what, total, interval, clock
        self._console = Console(stderr=True) if console is None else console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task(what, total=total)
        self._live = self._console.is_terminal
        self._began = self._printed = clock()
        self._done = 0

    def advance(self, count: int) -> None:
        """So many more requests are done."""
        self._done += count
        self._bar.advance(self._task, count)
        now = self._clock()
        if not self._live and (now - self._printed >= self._interval or self._done == self._total):
            self._printed = now
            left = (now - self._began) / self._done * (self._total - self._done)
            line = f"{self._what} {self._done:,}/{self._total:,}  {now - self._began:.0f} s  ETA {left:.0f} s"
            self._console.print(line, soft_wrap=True, highlight=False)

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()
