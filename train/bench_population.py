"""`python -m train bench-population`: a population's step against its members' steps one after another."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import melora_jax as mj
from train.assets import assets_cache, fetch_minilm
from train.bench_steps import Bench
from train.step import make_loss, measurer


@dataclasses.dataclass(frozen=True)
class Options:
    """Times one step of a population against a step of each of its members alone, in turns, at several batch sizes."""

    model: str | None = None
    """A folder or hub id of an encoder; by default all-MiniLM-L6-v2, fetched once."""
    members: int = 8
    """Runs in the population."""
    batch_sizes: tuple[int, ...] = (4, 32)
    """Rows a member and step."""
    length: int = 32
    """Tokens a row."""
    n: int = 8
    """Mini-adapters a layer."""
    r: int = 1
    """Rank of one mini-adapter."""
    at_once: int | None = None
    """Members whose activations are in memory at a time; by default all."""
    dropout: float = 0.0
    """Of the adapters; the model's own is as its config.json has it."""
    rounds: int = 7
    """Rounds; in each, both take one turn."""
    targets: tuple[str, ...] = ("query", "value")
    """Name suffixes of the adapted layers."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of each round, and those before the first step: tracing, and compiling with nothing kept from before."""

    alone: list[float]
    together: list[float]
    ready_alone: float
    ready_together: float

    def ratio(self, members: int) -> float:
        """How many times the steps of members alone take the population's, the median of the paired rounds."""
        return statistics.median(members * a / b for a, b in zip(self.alone, self.together, strict=True))


def bench_population(words: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train bench-population")
    if options.members < 1 or options.rounds < 1 or not options.batch_sizes or min(options.batch_sizes) < 1:
        raise ValueError("--members, --rounds and --batch-sizes must be at least 1")
    model = options.model or str(fetch_minilm(assets_cache()))
    console, device = Console(), jax.local_devices()[0].device_kind
    title = f"{options.members} members, rows of {options.length} tokens, {device}, jax {jax.__version__}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for header in ("rows", "alone ms", "together ms", "alone / together", "ready alone s", "ready together s"):
        table.add_column(header, justify="right")
    for rows in options.batch_sizes:
        console.print(f"compiling for {rows} rows a member ...")
        bench = Bench(model, "classification", rows, options.length, options.targets, "float32")
        timed = _time(bench, options)
        alone, together = (1e3 * statistics.median(one) for one in (timed.alone, timed.together))
        ready = (f"{timed.ready_alone:.1f}", f"{timed.ready_together:.1f}")
        table.add_row(str(rows), f"{alone:.1f}", f"{together:.1f}", f"{timed.ratio(options.members):.2f}", *ready)
    console.print(table)
    return 0


def _time(bench: Bench, options: Options) -> Timed:
    models = _models(bench, options)
    keys = list(jax.random.split(jax.random.key(0), options.members))
    tx = mj.make_optimizer(models[0], 1e-4)
    batch, loss = bench.batch(), make_loss(measurer("classification", chunk=1024))
    members = mj.make_members(keys)
    state, frozen = mj.population_state(models, tx, members)
    lone = mj.member_state(state, 0)
    step = mj.make_population_step(models[0], tx, loss, at_once=options.at_once)
    ready_together, together = _compiled(step, state, frozen, batch, members)
    ready_alone, alone = _compiled(mj.make_train_step(models[0], tx, loss), lone, frozen, batch, keys[0])
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.rounds):
        for times, advance in zip(seconds, (alone, together), strict=True):
            began = time.perf_counter()
            advance()
            times.append(time.perf_counter() - began)
    return Timed(*seconds, ready_alone, ready_together)


def _models(bench: Bench, options: Options) -> list[Any]:
    """Members over one base that differ in the start of their factors."""
    config = mj.MELoRAConfig(n=options.n, r=options.r, dropout=options.dropout, targets=bench.targets)
    models: list[Any] = []
    for seed in range(options.members):
        model = mj.from_pretrained(bench.model, num_labels=2)
        mj.adapt(model, config, rngs=nnx.Rngs(seed))
        if models:
            nnx.update(model, nnx.state(models[0], mj.FrozenParam))
        models.append(model)
    return models


def _compiled(step: Any, state: Any, frozen: Any, batch: Any, key: Any) -> tuple[float, Callable[[], None]]:
    """Seconds of tracing and compiling, and a function that takes one step on from the last."""
    kept = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        began = time.perf_counter()
        compiled = step.lower(state, frozen, batch, key).compile()
        ready = time.perf_counter() - began
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    held = [state]

    def advance() -> None:
        held[0], metrics = compiled(held[0], frozen, batch, key)
        jax.block_until_ready(metrics)

    advance()
    return ready, advance
