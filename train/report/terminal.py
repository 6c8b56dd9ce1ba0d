"""What a person sees while a run trains: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.report.run_rows import comparison_rows
from train.run_folder.folder import Run

WIDTH = 100
_BAR_WIDTH = 16
_SMOOTHING = 0.95  # the shown loss averages over about the last 1 / (1 - 0.95) = 20 updates


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
    import resource  # Unix alone has it, and only macOS comes this far

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Memory(peak if sys.platform == "darwin" else peak * 1024, "peak RSS")


@dataclasses.dataclass(kw_only=True)
class _Shown:
    """The numbers of the line."""

    step: int
    epoch: float = 0.0
    loss: float = math.nan
    learning_rate: float = 0.0
    examples_per_second: float = 0.0
    memory: Memory | None = None
    seconds_left: float | None = None


class Progress:
    """One line that follows a run; evaluations and notes are printed above it. A context manager.

    Args:
      total_steps: optimizer steps of the whole run.
      epochs: epochs of the whole run.
      start_step: the step from which a resumed run goes on.
      console: where to print; standard output by default.
      interval: seconds between lines where the output is not a terminal (a pipe, a CI log); no line there holds
        a control code or has more than 100 columns.
      clock: a monotonic clock in seconds.
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
        self._total_steps, self._epochs = total_steps, epochs
        self._console = Console() if console is None else console
        self._interval, self._clock = interval, clock
        self._shown = _Shown(step=start_step)
        self._mean_loss = self._mean_weight = 0.0
        self._first: tuple[int, float] | None = None
        self._printed_at = clock()
        live = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._live = Live(self, console=self._console, refresh_per_second=4) if live else None

    def update(self, *, step: int, epoch: float, loss: float, learning_rate: float, examples_per_second: float) -> None:
        """Shows one training step. `loss` is smoothed over about 20 updates; a non-finite one is shown as it is."""
        now = self._clock()
        if self._first is None:
            self._first = step, now  # after the first step, so that compiling does not count into the rate
        first_step, first_time = self._first
        done = step - first_step
        seconds_left = (now - first_time) / done * (self._total_steps - step) if done > 0 else None
        self._shown = _Shown(
            step=step,
            epoch=epoch,
            loss=self._smoothed(loss),
            learning_rate=learning_rate,
            examples_per_second=examples_per_second,
            memory=memory_in_use(),
            seconds_left=seconds_left,
        )
        if self._live is None and (now - self._printed_at >= self._interval or step == self._total_steps):
            self._printed_at = now
            self._print(_fit(self._fields(), WIDTH))

    def note(self, text: str) -> None:
        """Prints a sentence above the line."""
        self._print(text)

    def evaluation(self, step: int, epoch: float, metrics: Mapping[str, float], best: bool) -> None:
        """Prints one evaluation above the line, with * where it is the best so far."""
        values = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        row = f"eval  step {step}  epoch {epoch:.2f}  {values}{'  *' if best else ''}"
        self._print(row, "bold green" if best else "cyan")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The live line: a bar, and the fields that fit beside it."""
        width = min(options.max_width, WIDTH)
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self._total_steps, 1), completed=self._shown.step, width=_BAR_WIDTH)
        line.add_row(bar, Text(_fit(self._fields(), width - _BAR_WIDTH - 2), no_wrap=True))
        yield line

    def _print(self, text: str, style: str = "") -> None:
        """Prints in lines of at most 100 columns; a long word (a path) is not broken. No style outside a terminal."""
        width = min(self._console.width, WIDTH) if self._live else WIDTH
        for paragraph in text.splitlines():
            lines = textwrap.wrap(paragraph, width, break_long_words=False, break_on_hyphens=False)
            for line in lines or [""]:
                self._console.print(Text(line, style if self._live else ""), soft_wrap=True)

    def _smoothed(self, loss: float) -> float:
        """The exponential mean of the finite losses so far, corrected for its start."""
        if not math.isfinite(loss):
            return loss
        self._mean_loss = _SMOOTHING * self._mean_loss + (1 - _SMOOTHING) * loss
        self._mean_weight = _SMOOTHING * self._mean_weight + (1 - _SMOOTHING)
        return self._mean_loss / self._mean_weight

    def _fields(self) -> list[str]:
        """The line's parts, the most needed first."""
        shown = self._shown
        fields = [f"step {shown.step}/{self._total_steps}"]
        if shown.memory is None:
            return [*fields, "compiling the first step"]
        fields += [f"loss {shown.loss:.4f}", f"epoch {shown.epoch:.2f}/{self._epochs:g}"]
        fields += [f"ETA {_clock_time(shown.seconds_left)}", f"{shown.examples_per_second:.0f} ex/s"]
        return [*fields, f"lr {shown.learning_rate:.1e}", f"{shown.memory.source} {shown.memory.size / 2**30:.1f} GiB"]


def comparison_table(runs: Mapping[str, Run]) -> Table:
    """Runs side by side, one a row, for a terminal of 100 columns.

    Args:
      runs: label → run, in the order of the rows.
    """
    headers, rows = comparison_rows(runs)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    # Headers break between their words, and of the cells only labels that leave the numbers too little room.
    widths = [max(map(len, [*header.split(), *(row[column] for row in rows)])) for column, header in enumerate(headers)]
    widths[0] = min(widths[0], max(12, WIDTH - sum(widths[1:]) - 2 * len(widths)))
    for header, width in zip(headers, widths, strict=True):
        table.add_column(
            Text(header), justify="left" if header == headers[0] else "right", overflow="fold", width=width
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _fit(fields: list[str], width: int) -> str:
    """As many leading fields as `width` columns hold, at least the first."""
    line = fields[0]
    for field in fields[1:]:
        if len(line) + 2 + len(field) > width:
            break
        line += f"  {field}"
    return line


def _clock_time(seconds: float | None) -> str:
    """1:02:03, 2:03, or -:-- where it is not known yet."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
