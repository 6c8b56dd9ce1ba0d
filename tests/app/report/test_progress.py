"""What a terminal and a pipe get to see, read from the bytes that were written."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.app.report.synthetic_runs import make_run
from train.report.comparison import comparison_table
from train.report.terminal import Progress, memory_in_use
from train.run_folder.folder import read_run

STEP = {"epoch": 0.25, "loss": 0.5, "learning_rate": 4e-4, "examples_per_second": 80.1}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Advances by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def run_in_a_pipe(steps: int, seconds_a_step: float, **arguments: Any) -> list[str]:
    """The lines of a run of `steps` steps whose output is not a terminal."""
    file, clock = io.StringIO(), Clock()
    with Progress(steps, 2, console=Console(file=file), clock=clock, **arguments) as progress:
        for step in range(1, steps + 1):
            clock.now += seconds_a_step
            progress.update(step=step, **STEP)
    return file.getvalue().splitlines()


def test_a_pipe_gets_one_plain_line_every_interval_and_at_the_end() -> None:
    lines = run_in_a_pipe(steps=25, seconds_a_step=1.0, interval=10.0)
    assert [line.split("  ")[0] for line in lines] == ["step 10/25", "step 20/25", "step 25/25"]
    pattern = r"step 20/25  loss 0\.5000  epoch 0\.25/2  ETA 0:05  80 ex/s  lr 4\.0e-04  RSS \d+\.\d GiB"
    assert re.fullmatch(pattern, lines[1])


@pytest.mark.parametrize("force_colour", [None, "1"])
def test_a_pipe_gets_no_control_codes_and_at_most_100_columns(
    force_colour: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force_colour:
        monkeypatch.setenv("FORCE_COLOR", force_colour)
    file = io.StringIO()
    with Progress(10**12, 10**6, console=Console(file=file), interval=0.0) as progress:
        progress.note("word " * 50 + "[bold]not markup[/bold]")
        progress.update(step=10**11, epoch=9e5, loss=1e30, learning_rate=1e-300, examples_per_second=1e9)
        progress.evaluation(10**11, 9e5, {f"metric{k}": 1e6 for k in range(20)}, best=True)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", file.getvalue())
    assert max(map(cell_len, file.getvalue().splitlines())) <= 100
    words = file.getvalue().split()
    assert words.count("word") == 50
    assert "[bold]not" in words
    assert {f"metric{k}" for k in range(20)} <= set(words)


def test_a_table_in_a_note_keeps_its_lines_and_columns() -> None:
    file, table = io.StringIO(), "site   n\n  a   12\n\n  b    7"
    with Progress(1, 1, console=Console(file=file)) as progress:
        progress.note(table)
    assert file.getvalue() == table + "\n"


def test_a_long_path_in_a_note_is_not_broken() -> None:
    file, path = io.StringIO(), "/".join(["folder"] * 30)
    with Progress(1, 1, console=Console(file=file)) as progress:
        progress.note(f"saved {path}")
    assert path in file.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_the_live_line_fits_a_terminal(columns: int) -> None:
    file = Terminal()
    with Progress(1000, 3, console=Console(file=file, width=columns)) as progress:
        progress.update(step=250, **STEP)
        progress.evaluation(250, 1.0, {"accuracy": 0.851, "loss": 0.41}, best=True)
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", written) if line]
    assert max(map(cell_len, lines)) <= min(columns, 100)
    assert any("━" in line and "step 250/1000  loss 0.5000" in line for line in lines)
    assert any(line.rstrip() == "eval  step 250  epoch 1.00  accuracy 0.8510  loss 0.4100  *" for line in lines)
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1  # the cursor comes back


def test_the_cursor_comes_back_when_training_is_interrupted() -> None:
    file = Terminal()

    def interrupted() -> None:
        with Progress(10, 1, console=Console(file=file)) as progress:
            progress.update(step=1, **STEP)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_before_the_first_step_it_says_that_it_compiles() -> None:
    file = Terminal()
    with Progress(10, 1, start_step=4, console=Console(file=file)):
        pass
    assert "step 4/10  compiling the first step" in file.getvalue()


def test_an_evaluation_that_is_not_the_best_has_no_star() -> None:
    file = io.StringIO()
    with Progress(10, 1, console=Console(file=file)) as progress:
        progress.evaluation(5, 0.5, {"accuracy": 0.8}, best=False)
    assert file.getvalue().strip() == "eval  step 5  epoch 0.50  accuracy 0.8000"


def test_eta_leaves_out_the_first_step_and_the_steps_before_a_resume() -> None:
    file, clock = io.StringIO(), Clock()
    with Progress(100, 1, start_step=40, console=Console(file=file), interval=0.0, clock=clock) as progress:
        clock.now += 60.0  # compiling
        progress.update(step=41, **STEP)
        clock.now += 20.0
        progress.update(step=51, **STEP)
    first, second = file.getvalue().splitlines()
    assert "ETA -:--" in first
    assert "ETA 1:38" in second  # 49 steps left at 2 s


def test_eta_spells_out_hours() -> None:
    lines = run_in_a_pipe(steps=3, seconds_a_step=3723.0, interval=0.0)
    assert "ETA 1:02:03" in lines[1]


def test_the_loss_is_an_exponential_mean_that_nan_does_not_poison() -> None:
    file, losses = io.StringIO(), [1.0, 2.0, math.nan, 4.0]
    with Progress(9, 1, console=Console(file=file), interval=0.0) as progress:
        for step, loss in enumerate(losses, start=1):
            progress.update(step=step, **{**STEP, "loss": loss})
    shown = re.findall(r"loss (\S+)", file.getvalue())
    weights = [0.95**2, 0.95, 1.0]
    mean = sum(w * x for w, x in zip(weights, (1.0, 2.0, 4.0), strict=True)) / sum(weights)
    assert shown == ["1.0000", f"{(0.95 + 2.0) / 1.95:.4f}", "nan", f"{mean:.4f}"]


def test_memory_is_the_devices_peak_where_the_backend_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 7 << 30, "bytes_in_use": 1})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    memory = memory_in_use()
    assert (memory.size, memory.source) == (7 << 30, "device peak")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_the_resident_set_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: None)])
    memory = memory_in_use()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])
    assert memory.source == "RSS"
    assert memory.size == pytest.approx(kilobytes * 1024, rel=0.05)


def test_the_comparison_fits_100_columns_and_loses_nothing(tmp_path: Path) -> None:
    runs = {
        "head only": read_run(make_run(tmp_path / "head", n=0, r=0, score=0.75)),
        "MELoRA n=8 r=8, and a label much longer than a column": read_run(make_run(tmp_path / "long")),
        "LoRA r=8 [red]": read_run(make_run(tmp_path / "lora", n=1, r=8, learning_rate=2e-5)),
    }
    file = io.StringIO()
    Console(file=file, width=100).print(comparison_table(runs))
    lines = file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 100
    assert re.search(r"head only +0 +148,610 +- +0\.001 +0\.\d{4} +82\.2", file.getvalue())
    assert re.search(r"LoRA r=8 \[red\] +73,728 +148,610 +8 +2e-05 +0\.8\d{3} +82\.2", file.getvalue())
    assert "a label much longer than a column" in " ".join(line[:40].strip() for line in lines)
    heads = " ".join(lines[:4])
    assert [word for word in ("adapter", "rank", "learning", "accuracy", "s/epoch") if word not in heads] == []
