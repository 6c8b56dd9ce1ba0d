"""`python -m train bench`: training-step times as ratios, all variants taking turns in one run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

import melora_jax as mj
from train.assets import assets_cache, fetch_minilm, fetch_smollm2
from train.bench_steps import Bench, Step, variants
from train.errors import RunError

_TARGETS = {"classification": ("query", "value"), "causal-lm": ("q_proj", "v_proj")}
_SHAPES = {"classification": (32, 64), "causal-lm": (2, 256)}
_TORCH = "torch+PEFT LoRA r=8"


@dataclasses.dataclass(frozen=True)
class Options:
    """Times a training step of MELoRA and LoRA against the frozen model's forward pass and input gradients."""

    task: Literal["classification", "causal-lm"] = "classification"
    """What the model does."""
    model: str | None = None
    """A folder, hub id or .gguf file; by default all-MiniLM-L6-v2 or SmolLM2-135M-Instruct, fetched once."""
    batch_size: int | None = None
    """Rows a step; by default 32, or 2 of a causal-lm."""
    length: int | None = None
    """Tokens a row; by default 64, or 256 of a causal-lm."""
    rounds: int = 9
    """Rounds; in each, every variant takes one turn."""
    targets: tuple[str, ...] = ()
    """Name suffixes of the adapted layers; by default query and value."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model."""
    only: tuple[str, ...] = ()
    """Time these variants alone."""
    memory: bool = False
    """Run each variant in a process of its own too, for its peak memory."""
    alone: bool = False
    """Take two steps of the one variant named by --only and print the process's peak memory in bytes."""


def bench(words: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train bench")
    with tempfile.TemporaryDirectory() as folder:
        subject = _subject(options, Path(folder))
        steps = {name: make for name, make in variants(subject).items() if _wanted(name, options)}
        if not steps:
            raise ValueError(
                f"--only {' '.join(options.only)} names no variant; there are {', '.join(variants(subject))}"
            )
        if options.alone:
            _take(next(iter(steps.values()))(), 2)
            print(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
            return 0
        peaks = {name: _peak(name, subject) for name in steps} if options.memory else {}
        console, ready, preparing = Console(), {}, {}
        for name, make in steps.items():
            console.print(f"compiling {name} ...")
            began = time.perf_counter()
            ready[name] = make()
            _take(ready[name], 1)
            preparing[name] = time.perf_counter() - began
        seconds = _turns(ready, options.rounds)
        console.print(_table(subject, seconds, preparing, ready, peaks))
    return 0


def _subject(options: Options, folder: Path) -> Bench:
    fetch = {"classification": fetch_minilm, "causal-lm": fetch_smollm2}[options.task]
    model = options.model or str(fetch(assets_cache()))
    if model.endswith(".gguf"):
        # torch reads no such file without effort, and all shall have the same weights
        mj.save_pretrained(mj.from_pretrained(model, task=options.task, dtype=options.dtype), folder / "model")
        model = str(folder / "model")
    rows, length = _SHAPES[options.task]
    return Bench(
        model,
        options.task,
        options.batch_size or rows,
        options.length or length,
        options.targets or _TARGETS[options.task],
        options.dtype,
    )


def _wanted(name: str, options: Options) -> bool:
    if options.only:
        return name in options.only
    return name != _TORCH or all(importlib.util.find_spec(package) for package in ("torch", "peft"))


def _take(step: Step, count: int) -> None:
    for _ in range(count):
        step.advance()


def _peak(name: str, subject: Bench) -> int:
    """The peak resident memory of a process that takes two steps of one variant, loading and compiling counted."""
    values = dataclasses.asdict(subject) | {"only": name}
    words = [word for key, value in values.items() for word in (f"--{key}", *_words(value))]
    command = [sys.executable, "-m", "train", "bench", "--alone", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the process that measures the memory of {name} failed: {done.stderr.strip()[-300:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _words(value: object) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, tuple) else [str(value)]


def _turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round. Turns make what else the machine does fall on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step.advance()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _table(
    subject: Bench,
    seconds: dict[str, list[float]],
    preparing: dict[str, float],
    steps: dict[str, Step],
    peaks: dict[str, int],
) -> Table:
    first = next(iter(seconds))
    device = jax.local_devices()[0].device_kind
    shape = f"{subject.batch_size} x {subject.length} tokens, {subject.dtype}"
    table = Table(title=f"{shape}, {device}, jax {jax.__version__}", title_justify="left", box=None, pad_edge=False)
    headers = ["step", "ms (median)", f"times {first}", "tokens/s", "ready after s", "XLA plan MB"]
    for header in [*headers, *(["peak MB"] if peaks else [])]:
        table.add_column(header, justify="left" if header == "step" else "right", no_wrap=header == "step")
    limit = statistics.median(seconds[first])
    for name, times in seconds.items():
        median, planned = statistics.median(times), steps[name].planned_bytes
        speed = subject.batch_size * subject.length / median
        cells = [f"{1e3 * median:.1f}", f"{median / limit:.3f}", f"{speed:,.0f}", f"{preparing[name]:.1f}"]
        cells += ["-" if planned is None else f"{planned / 1e6:,.0f}"]
        table.add_row(name, *cells, *([f"{peaks[name] / 1e6:,.0f}"] if peaks else []))
    return table
