"""`python -m train bench-population`: a population's step against its members' steps one after another."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tyro
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

import melora_jax as mj
from melora_jax.training import make_members, make_population_step, member_state, population_state
from train.assets.assets import assets_cache, fetch_minilm
from train.lab.bench.steps import Bench
from train.loop.cohort import as_many_as_pay
from train.loop.losses import make_loss, measurer
from train.report.tables import terminal_table


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
    """Members whose activations are in memory at a time; by default all, and on CPU as many as make it faster."""
    dropout: float = 0.0
    """Of the adapters; the model's own dropout is set by its config.json."""
    steps: int = 100
    """Steps of the run whose total time, compiling included, the last ratio compares."""
    rounds: int = 7
    """Rounds; in each, both take one turn."""
    targets: tuple[str, ...] = ("query", "value")
    """Name suffixes of the adapted layers."""


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of each round, and those before a first step: tracing and compiling (`again`: read from the cache)."""

    alone: list[float]
    together: list[float]
    ready_alone: float
    again_alone: float
    ready_together: float

    def ratio(self, members: int) -> float:
        """The time of all members one after another over the population's time: the median of paired rounds."""
        return statistics.median(members * a / b for a, b in zip(self.alone, self.together, strict=True))

    def ratio_with_start(self, members: int, steps: int) -> float:
        """The same for runs of `steps` steps with compiling: members alone compile once, then use the cache."""
        alone, together = statistics.median(self.alone), statistics.median(self.together)
        starts = self.ready_alone + (members - 1) * self.again_alone
        return (starts + members * steps * alone) / (self.ready_together + steps * together)


def bench_population(words: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train bench-population")
    if options.members < 1 or options.rounds < 1 or not options.batch_sizes or min(options.batch_sizes) < 1:
        raise ValueError("--members, --rounds and --batch-sizes must be at least 1")
    model = options.model or str(fetch_minilm(assets_cache()))
    console, device = Console(), jax.local_devices()[0].device_kind
    title = f"{options.members} members, rows of {options.length} tokens, {device}, jax {jax.__version__}"
    with_start = f"ratio, {options.steps} steps and compiling"
    headers = ["rows", "at a time", "alone ms", "together ms", "ratio", with_start]
    headers += ["ready alone s", "again s", "ready together s"]
    rows = []
    for size in options.batch_sizes:
        console.print(f"compiling for {size} rows a member ...")
        bench = Bench(model, "classification", size, options.length, options.targets, "float32")
        rows.append(_cells(bench, options, _time(bench, options)))
    console.print(terminal_table(headers, rows, text_columns=(), title=title))
    return 0


def _cells(bench: Bench, options: Options, timed: Timed) -> list[str]:
    alone, together = (1e3 * statistics.median(one) for one in (timed.alone, timed.together))
    ratios = (timed.ratio(options.members), timed.ratio_with_start(options.members, options.steps))
    ready = (timed.ready_alone, timed.again_alone, timed.ready_together)
    return [
        str(bench.batch_size),
        str(_at_once(bench, options)),
        f"{alone:.1f}",
        f"{together:.1f}",
        *(f"{ratio:.2f}" for ratio in ratios),
        *(f"{seconds:.1f}" for seconds in ready),
    ]


def _time(bench: Bench, options: Options) -> Timed:
    models = _models(bench, options)
    keys = list(jax.random.split(jax.random.key(0), options.members))
    tx = mj.make_optimizer(models[0], 1e-4)
    batch, loss = bench.batch(), make_loss(measurer("classification", chunk=1024))
    members = make_members(keys)
    state, frozen = population_state(models, tx, members)
    lone = member_state(state, 0)
    step = make_population_step(models[0], tx, loss, at_once=_at_once(bench, options))
    ready_together, _, together = _compiled(step, state, frozen, batch, members)
    ready_alone, again_alone, alone = _compiled(mj.make_train_step(models[0], tx, loss), lone, frozen, batch, keys[0])
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.rounds):
        for times, advance in zip(seconds, (alone, together), strict=True):
            began = time.perf_counter()
            advance()
            times.append(time.perf_counter() - began)
    return Timed(*seconds, ready_alone, again_alone, ready_together)


def _at_once(bench: Bench, options: Options) -> int:
    return options.at_once or as_many_as_pay(options.members, bench.batch_size * bench.length)


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


def _compiled(step: Any, state: Any, frozen: Any, batch: Any, key: Any) -> tuple[float, float, Callable[[], None]]:
    """Seconds until ready without and with the program in XLA's cache, and a function that takes the next step."""

    def ready() -> tuple[float, Any]:
        jax.clear_caches()
        began = time.perf_counter()
        compiled = step.lower(state, frozen, batch, key).compile()
        return time.perf_counter() - began, compiled

    with _empty_cache():
        first, _ = ready()
        again, compiled = ready()
    held = [state]

    def advance() -> None:
        held[0], metrics = compiled(held[0], frozen, batch, key)
        jax.block_until_ready(metrics)

    advance()
    return first, again, advance


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """Points XLA's cache of compiled programs at an empty folder."""
    before: str | None = jax.config.values["jax_compilation_cache_dir"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            _keep_in(folder)
            yield
        finally:
            _keep_in(before)


def _keep_in(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # else the process keeps using its first folder
