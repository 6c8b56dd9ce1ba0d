"""`python -m train glue`: tasks by methods by seeds, rates chosen fairly, as one resumable table."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from train.commands.study import write_study
from train.lab.tables.cells import is_finished, run_cells
from train.lab.tables.results import read_results, score_after_last, write_manifest
from train.lab.tables.table import Row, plan_table
from train.loop.description import describe_run
from train.loop.loop import exit_code
from train.loop.metrics import is_better
from train.report.tables import terminal_table
from train.run_folder.errors import RunError
from train.run_folder.folder import read_run

_REFERENCE = "lora"


@dataclasses.dataclass(frozen=True)
class Options:
    """Run GLUE tasks by several methods. Options of `run` follow after --, and hold for every task."""

    model: str | None = None
    """A folder or hub id; by default the recipes' own, RoBERTa-base."""
    tasks: tuple[str, ...] = ("all",)
    """GLUE recipes such as rte and cola-80, or all: the paper's eight."""
    methods: tuple[str, ...] = ("lora:r=8", "melora:n=2,r=8", "full")
    """Methods, each METHOD or METHOD:KEY=VALUE,...; a key is one of [adapter], or SECTION.KEY."""
    reference: str | None = None
    """The method that the others are compared with; by default the first LoRA, or the first of all."""
    data: Path | None = None
    """A folder of TASK/train.* and TASK/validation.* files with GLUE's columns; by default the hub's."""
    seeds: int = 1
    """Runs a method and task, at seeds 42, 43 and on."""
    rates: tuple[float, ...] = ()
    """Learning rates to choose from, for each method and task; by default the recipe's own, without a choice."""
    held_back: int = 500
    """Training rows, drawn at random, on which the learning rate is chosen."""
    warm_start: bool = False
    """Start MRPC, RTE and STS-B from the same method's MNLI adapter."""
    folder: Path = Path("runs/glue")
    """Where results go; an interrupted table resumes where it stopped."""
    dry_run: bool = False
    """Print what would be run and how many parameters it trains, from the model's config.json alone."""


def glue(words: Sequence[str]) -> int:
    """Runs or resumes the table; returns the exit code."""
    own, overrides = _split(words)
    options = tyro.cli(Options, args=own, prog="python -m train glue", use_underscores=True)
    rows = plan_table(
        model=options.model,
        tasks=options.tasks,
        methods=options.methods,
        folder=options.folder,
        data=options.data,
        rates=options.rates,
        seeds=range(42, 42 + options.seeds),
        held_back=options.held_back,
        warm_start=options.warm_start,
        overrides=overrides,
    )
    reference = _reference(options, rows)
    console = Console()
    if options.dry_run:
        console.print(_planned(rows))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    command = ["python", "-m", "train", "glue", *words]
    write_manifest(options.folder, rows, reference, shlex.join(command))
    for number, row in enumerate(rows, start=1):
        console.rule(f"{number} of {len(rows)}: {row.task}, {row.arm.word}")
        stopped = _run_row(console, row, command)
        if stopped is not None:
            console.print("stopped; the same command resumes the table", highlight=False)
            return stopped
    console.print(_summary(options.folder))
    console.print(f"page     {write_study(options.folder)}", soft_wrap=True, highlight=False)
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our options, and those after --."""
    at = list(words).index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def _reference(options: Options, rows: Sequence[Row]) -> str:
    words = list(dict.fromkeys(row.arm.word for row in rows))
    if options.reference is None:
        return next((word for word in words if word.partition(":")[0] == _REFERENCE), words[0])
    if options.reference not in words:
        raise ValueError(f"--reference {options.reference} is not one of the methods; choose from {', '.join(words)}")
    return options.reference


def _run_row(console: Console, row: Row, command: Sequence[str]) -> int | None:
    """Chooses the row's learning rate and trains its runs; the exit code if a signal stopped one."""
    choices = row.choices()
    stopped = run_cells(list(choices.values()), row.folder / "rates", command) if choices else None
    if stopped is None:
        rate = _best_rate(row) if choices else row.rates[0]
        if choices:
            console.print(f"learning rate {rate:g}, by {row.held_back} training rows held back", highlight=False)
        stopped = run_cells(row.reported(rate), row.folder / "seeds", command)
    return None if stopped is None else exit_code(stopped)


def _best_rate(row: Row) -> float:
    """The rate whose run scores best after its last step; the lowest of equals."""
    best: tuple[float, float] | None = None
    for rate, config in sorted(row.choices().items()):
        score = score_after_last(read_run(config.output.folder))
        if is_better(row.base.metric, score, None if best is None else best[1]):
            best = rate, score
    if best is None:
        raise RunError(f"{row.task}, {row.arm.word}: no learning rate gave a score; give lower --rates")
    return best[0]


def _planned(rows: Sequence[Row]) -> Table:
    headers = ("task", "method", "adapters", "base", "heads", "share", "runs", "done")
    lines = []
    for row in rows:
        count = describe_run(row.base).adaptation
        runs = [*row.choices().values(), *row.reported(row.rates[0])]
        done = sum(is_finished(Path(run.output.folder)) for run in runs)
        share = count.trainable / (count.trainable + count.frozen)
        cells = [f"{count.adapter:,}", f"{count.base:,}", f"{count.head:,}", f"{share:.3%}", str(len(runs)), str(done)]
        lines.append([row.task, row.arm.word, *cells])
    return terminal_table(headers, lines, text_columns=(0, 1))


def _summary(folder: Path) -> Table:
    headers = ("task", "method", "parameters", "lr", "score", "best evaluation")
    lines = []
    for row in read_results(folder):
        cells = [f"{row.parameters:,}", f"{row.rate:.2g}", str(row.score), str(row.best_score)]
        lines.append([f"{row.task} ({row.metric})", row.word, *cells])
    return terminal_table(headers, lines, text_columns=(0, 1))
