"""`python -m train bench`: training-step times as ratios, with all variants taking turns in one run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

import melora_jax as mj
from train.assets.assets import assets_cache, fetch_minilm, fetch_smollm2
from train.lab.bench.compile import compile_rows
from train.lab.bench.page import screen_tables, write_page
from train.lab.bench.plot import plot_path, png_of
from train.lab.bench.record import Record, Run, machine, record_of, row_of, save
from train.lab.bench.steps import TORCH, Bench, Facts, Step, torch_step, variants
from train.process import keep_freed_memory
from train.run_folder.errors import RunError
from train.run_folder.log import replace_bytes

_TARGETS = {"classification": ("query", "value"), "causal-lm": ("q_proj", "v_proj")}
_SHAPES = {"classification": (32, 64), "causal-lm": (2, 256)}
_SWEEPS = ("n", "r", "tokens", "width", "depth")
_RANDOM = (384, 6)  # width and depth of random weights, unless a sweep varies them


@dataclasses.dataclass(frozen=True)
class Options:
    """Times a training step of MELoRA and LoRA against the frozen model's forward pass and input gradients."""

    task: Literal["classification", "causal-lm"] = "classification"
    """What the model does."""
    model: str | None = None
    """A folder, hub id or .gguf file; by default all-MiniLM-L6-v2 or SmolLM2-135M-Instruct, fetched once."""
    batch_size: int | None = None
    """Rows a step; by default 32, or 2 for a causal-lm."""
    length: int | None = None
    """Tokens a row; by default 64, or 256 for a causal-lm."""
    rounds: int = 9
    """Rounds; in each, every variant takes one turn."""
    turn: int = 1
    """Steps a turn."""
    targets: tuple[str, ...] = ()
    """Name suffixes of the adapted layers, or all-linear; by default query and value."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model."""
    only: tuple[str, ...] = ()
    """Time only these variants."""
    sweep: tuple[str, ...] = ()
    """Such as n=1,4,8,16,32 r=1,8: every combination, against the frozen limit. tokens varies the batch; width and
    depth vary the size of a model with random weights."""
    compile_depths: tuple[int, ...] = ()
    """Instead of timing steps, compile one of a Llama-2-7B with these numbers of layers, from shapes."""
    out: Path | None = None
    """Write the result into this .json file, and its figure beside it."""
    title: str = "Training step"
    """The result's title."""
    page: Path | None = None
    """Instead of timing, fill this Markdown page from the results that it names."""
    results: Path = Path("results/speed")
    """Where the page's results are."""
    memory: bool = False
    """Also run each variant in its own process, for its peak memory."""
    alone: bool = False
    """Take two steps of the one variant named by --only and print the process's peak memory in bytes."""


def bench(words: Sequence[str]) -> int:
    """Prints the tables; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train bench")
    console = Console()
    if options.page:
        write_page(options.page, options.results, console.print)
        return 0
    if min(options.rounds, options.turn) < 1:
        raise ValueError(f"--rounds {options.rounds} and --turn {options.turn} must be at least 1")
    sweeps = dict(map(_sweep, options.sweep))
    if sweeps and options.memory:
        raise ValueError("--memory is of the variants of one model; leave --sweep out")
    with tempfile.TemporaryDirectory() as folder, _nothing_cached():
        if options.compile_depths:
            compiles = compile_rows(options.compile_depths, console.print)
            return _finish(Run(options.title, machine(), ["depth"], [], compiles), options, console)
        subjects = list(_subjects(options, sweeps, Path(folder)))
        if options.alone:
            torch_alone = options.only == (TORCH,)
            step = Step(torch_step(subjects[0]), Facts()) if torch_alone else _one_step(options, subjects[0])
            _take(step, 2)
            print(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
            return 0
        records = [_record(options, subject, sweeps, console.print) for subject in subjects]
    return _finish(Run(options.title, machine(), _varied(sweeps), records, []), options, console)


def _finish(run: Run, options: Options, console: Console) -> int:
    wide = Console(width=max(console.width, 150))  # a terminal wraps long lines, but rich would break numbers
    for table in screen_tables(run):
        wide.print(table)
    if options.out:
        save(run, options.out)
        if run.records:
            replace_bytes(plot_path(options.out), png_of(run))
        console.print(f"{options.out} is written")
    return 0


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
    """Turns the cache of compiled programs off, since compilations are timed."""
    settings: Any = jax.config
    before = settings.jax_enable_compilation_cache
    settings.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        settings.update("jax_enable_compilation_cache", before)


def _sweep(word: str) -> tuple[str, tuple[int, ...]]:
    """A word such as n=1,2,4.

    Raises:
      ValueError: the word names no quantity, or its values are not whole numbers from 1.
    """
    name, _, values = word.partition("=")
    if name not in _SWEEPS:
        raise ValueError(
            f"--sweep {word}: {name!r} is not a quantity; choose from {', '.join(_SWEEPS)}, such as n=1,2,4"
        )
    try:
        numbers = tuple(int(value) for value in values.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--sweep {word}: {values!r} is not a list of whole numbers from 1, such as 1,2,4")
    return name, numbers


def _varied(sweeps: dict[str, tuple[int, ...]]) -> list[str]:
    """The quantities that change the subject, not only the adapter."""
    return [name for name in sweeps if name in ("tokens", "width", "depth")]


def _subjects(options: Options, sweeps: dict[str, tuple[int, ...]], folder: Path) -> Iterator[Bench]:
    """The subjects to time: one, or one for each combination of tokens, width and depth."""
    names = _varied(sweeps)
    sized = "width" in names or "depth" in names
    model = "" if sized else _model(options, folder)
    rows, length = _SHAPES[options.task]
    rows, length = options.batch_size or rows, options.length or length
    targets = options.targets or _TARGETS[options.task]
    for values in itertools.product(*(sweeps[name] for name in names)):
        at = dict(zip(names, values, strict=True))
        count = at.get("tokens", rows * length)
        if count % length:
            raise ValueError(f"--sweep tokens: {count} is not a multiple of --length {length}")
        width, depth = (
            at.get(name, usual) if sized else 0 for name, usual in zip(("width", "depth"), _RANDOM, strict=True)
        )
        yield Bench(model, options.task, count // length, length, targets, options.dtype, width, depth)


def _model(options: Options, folder: Path) -> str:
    fetch = {"classification": fetch_minilm, "causal-lm": fetch_smollm2}[options.task]
    model = options.model or str(fetch(assets_cache()))
    if model.endswith(".gguf"):
        # torch does not read GGUF files easily, and all variants must have the same weights
        kept = folder / Path(model).stem
        mj.save_pretrained(mj.from_pretrained(model, task=options.task, dtype=options.dtype), kept)
        model = str(kept)
    return model


def _steps(options: Options, subject: Bench, sweeps: dict[str, tuple[int, ...]]) -> dict[str, Callable[[], Step]]:
    """The variants that the options name.

    Raises:
      ValueError: there is no such variant.
    """
    minis = list(itertools.product(sweeps.get("n", (8,)), sweeps.get("r", (8,) if "n" in sweeps else (1, 8))))
    steps = variants(subject, minis, detail=not sweeps)
    chosen = {name: make for name, make in steps.items() if not options.only or name in options.only}
    if not chosen:
        raise ValueError(f"--only {' '.join(options.only)} names no variant; there are {', '.join(steps)}")
    return chosen


def _one_step(options: Options, subject: Bench) -> Step:
    return next(iter(_steps(options, subject, {}).values()))()


def _record(options: Options, subject: Bench, sweeps: dict[str, tuple[int, ...]], say: Callable[[str], None]) -> Record:
    makers = _steps(options, subject, sweeps)
    peaks = {name: _peak(name, subject) for name in makers} if options.memory else {}
    ready: dict[str, Step] = {}
    try:
        for name, make in makers.items():
            say(f"compiling {name} ...")
            ready[name] = make()
            _take(ready[name], ready[name].warm_up)
        keep_freed_memory()
        seconds = _turns(ready, options.rounds, options.turn)
    finally:
        for step in ready.values():
            step.close()
    rows = [row_of(name, seconds[name], step.facts, peaks.get(name)) for name, step in ready.items()]
    return record_of(subject, rows)


def _take(step: Step, count: int) -> None:
    for _ in range(count):
        step.advance()


def _peak(name: str, subject: Bench) -> int:
    """The peak resident memory of a process that takes two steps of one variant, loading and compiling included."""
    values = {key: value for key, value in dataclasses.asdict(subject).items() if key not in ("width", "depth")}
    words = [word for key, value in (values | {"only": name}).items() for word in (f"--{key}", *_words(value))]
    command = [sys.executable, "-m", "train", "bench", "--alone", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the process that measures the memory of {name} failed: {done.stderr.strip()[-300:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _words(value: object) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, tuple) else [str(value)]


def _turns(steps: dict[str, Step], rounds: int, turn: int) -> dict[str, list[float]]:
    """Seconds a step of each variant in each round. Taking turns spreads disturbances evenly over the variants."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            _take(step, turn)
            seconds[name].append((time.perf_counter() - began) / turn)
    return seconds
