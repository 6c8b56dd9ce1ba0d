"""Progress for a person to follow: a live line with a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.progress import Progress as Bar
from rich.text import Text

WIDTH = 100
_BAR_WIDTH = 16
_SMOOTHING = 0.95  # the loss shown averages over about the last 1 / (1 - 0.95) = 20 updates


@dataclasses.dataclass(frozen=True)
class Memory:
    """A size in bytes and what it counts: "device peak", "RSS" or "peak RSS"."""

    size: int
    source: str


def memory_in_use() -> Memory:
    """The first local device's peak memory where the backend reports it (GPU, TPU), else the process's.

    >>> memory_in_use().size > 0
    True
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return Memory(int(statistics["peak_bytes_in_use"]), "device peak")
    pages = Path("/proc/self/statm")
    if pages.exists():
        return Memory(int(pages.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE"), "RSS")
    import resource  # only Unix has it, and only macOS reaches this line

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(peak if sys.platform == "darwin" else peak * 1024, "peak RSS")


class LiveLine:
    """One line that follows work, redrawn in place on a terminal and printed now and then elsewhere.

    A context manager. Elsewhere (a pipe, a CI log) no line holds a control code or has more than 100 columns.

    Args:
      total: what `show` counts up to.
      fields: the line's parts at the start, the most needed first; those that don't fit are left out.
      done: what is done at the start.
      console: where to print; standard output by default.
      interval: seconds between lines where the output is not a terminal.
      clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        total: int,
        fields: Sequence[str],
        *,
        done: int = 0,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = Console() if console is None else console
        self._total, self._interval, self._clock = total, interval, clock
        self._printed_at = clock()
        self._live = self._console.file.isatty() and not self._console.is_dumb_terminal
        columns = BarColumn(bar_width=_BAR_WIDTH), _Fields(self._console)
        self._bar = Bar(*columns, console=self._console, refresh_per_second=4)
        self._task = self._bar.add_task("", total=max(total, 1), completed=done, fields=fields)

    def show(self, done: int, fields: Sequence[str], now: float) -> None:
        """Shows what is done at the time `now`; outside a terminal, a line is printed only when it is due."""
        self._bar.update(self._task, completed=done, fields=fields)
        if not self._live and (now - self._printed_at >= self._interval or done == self._total):
            self._printed_at = now
            self.print(_fit(fields, WIDTH))

    def print(self, text: str, style: str = "") -> None:
        """Prints above the line, wrapped to at most 100 columns; a long word (a path) stays whole."""
        width = min(self._console.width, WIDTH) if self._live else WIDTH
        for paragraph in text.splitlines():
            lines = textwrap.wrap(paragraph, width, break_long_words=False, break_on_hyphens=False)
            for line in lines or [""]:
                self._console.print(Text(line, style if self._live else ""), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()


class _Fields(ProgressColumn):
    """As many of a task's fields as fit beside the bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def render(self, task: Task) -> Text:
        """The text of one task."""
        return Text(_fit(task.fields["fields"], min(self._console.width, WIDTH) - _BAR_WIDTH - 2), no_wrap=True)


class Progress(LiveLine):
    """The line of a training run; evaluations and notes are printed above it.

    Args:
      total_steps: optimizer steps of the whole run.
      epochs: epochs of the whole run.
      start_step: the step from which a resumed run continues.
      console, interval, clock: as for `LiveLine`.
    """

    def __init__(
        self,
        total_steps: int,
        epochs: float,
        *,
        start_step: int = 0,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        fields = [f"step {start_step}/{total_steps}", "compiling the first step"]
        super().__init__(total_steps, fields, done=start_step, console=console, interval=interval, clock=clock)
        self._epochs = epochs
        self._mean_loss = self._mean_weight = 0.0
        self._first: tuple[int, float] | None = None

    def update(self, *, step: int, epoch: float, loss: float, learning_rate: float, examples_per_second: float) -> None:
        """Shows one training step. `loss` is smoothed over about 20 updates; a non-finite one is shown as it is."""
        now, memory = self._clock(), memory_in_use()
        fields = [
            f"step {step}/{self._total}",
            f"loss {self._smoothed(loss):.4f}",
            f"epoch {epoch:.2f}/{self._epochs:g}",
            f"ETA {_clock_time(self._seconds_left(step, now))}",
            f"{examples_per_second:.0f} ex/s",
            f"lr {learning_rate:.1e}",
            f"{memory.source} {memory.size / 2**30:.1f} GiB",
        ]
        self.show(step, fields, now)

    def note(self, text: str) -> None:
        """Prints a sentence above the line."""
        self.print(text)

    def evaluation(self, step: int, epoch: float, metrics: Mapping[str, float], best: bool) -> None:
        """Prints one evaluation above the line, with * where it is the best so far."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        row = f"eval  step {step}  epoch {epoch:.2f}  {values}{'  *' if best else ''}"
        self.print(row, "bold green" if best else "cyan")

    def _seconds_left(self, step: int, now: float) -> float | None:
        """From the pace since the first step; that step is left out because it compiles."""
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        done = step - first_step
        return (now - first_time) / done * (self._total - step) if done > 0 else None

    def _smoothed(self, loss: float) -> float:
        """The exponential mean of the finite losses so far, corrected for its start."""
        if not math.isfinite(loss):
            return loss
        self._mean_loss = _SMOOTHING * self._mean_loss + (1 - _SMOOTHING) * loss
        self._mean_weight = _SMOOTHING * self._mean_weight + (1 - _SMOOTHING)
        return self._mean_loss / self._mean_weight


class RequestProgress(LiveLine):
    """The line of a number of equal requests, on standard error by default.

    Args:
      what: the requests' name.
      total: how many there are.
      console, interval, clock: as for `LiveLine`.
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
        console = Console(stderr=True) if console is None else console
        super().__init__(total, [f"{what} 0/{total:,}"], console=console, interval=interval, clock=clock)
        self._what, self._done, self._began = what, 0, self._printed_at

    def advance(self, count: int) -> None:
        """Counts `count` more requests as done."""
        self._done += count
        now = self._clock()
        spent = now - self._began
        left = spent / self._done * (self._total - self._done)
        self.show(
            self._done, [f"{self._what} {self._done:,}/{self._total:,}", f"{spent:.0f} s", f"ETA {left:.0f} s"], now
        )


def _fit(fields: Sequence[str], width: int) -> str:
    """As many leading fields as `width` columns hold, at least the first."""
    line = fields[0]
    for field in fields[1:]:
        if len(line) + 2 + len(field) > width:
            break
        line += f"  {field}"
    return line


def _clock_time(seconds: float | None) -> str:
    """1:02:03, 2:03, or -:-- where it is not yet known."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
