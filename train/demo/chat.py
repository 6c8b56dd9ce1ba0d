"""`make demo-chat`: a small chat model, instructions, and MELoRA beside LoRA with equally many parameters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from train.assets.assets import assets_cache, fetch_alpaca_demo, fetch_smollm2
from train.chat.speaker import Manner, Speaker
from train.config.run_config import RunConfig
from train.config.schema import (
    AdapterConfig,
    DataConfig,
    InstructionConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    TrainConfig,
)
from train.data.conversations import Conversation, Turn
from train.data.templates import make_template
from train.data.tokens import read_tokenizer
from train.demo.reviews import emptied
from train.loop.best import finish
from train.loop.loop import describe_stop, exit_code, run
from train.loop.setup import prepare
from train.report.comparison import rank_range, write_comparison
from train.report.tables import terminal_table
from train.run_folder.folder import Run, read_run

PROMPTS = (
    "Name three things to pack for a walk in the rain.",
    "Rewrite this sentence politely: Give me the report now.",
    "Why is the sky blue? Answer in one sentence.",
)
METHODS = {"LoRA r=8": ("lora-r8", 1), "MELoRA n=8 r=8": ("melora-n8-r8", 8)}
Answers = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Tunes SmolLM2-135M-Instruct on 902 instructions by LoRA and MELoRA of the same size, and compares answers."""

    steps: int = 300
    """Optimizer steps of each method."""
    batch_size: int = 1
    """Rows of 512 tokens a step; a row holds several conversations."""
    learning_rate: float = 1e-3
    """Peak learning rate of both methods."""
    seed: int = 42
    """Seed of the adapters and of the order of rows."""
    answer_tokens: int = 60
    """The longest answer, in tokens."""
    folder: str = "runs/demo-chat"
    """Where results go; an earlier demo there is replaced."""


def demo_chat(words: Sequence[str]) -> int:
    """Runs all of it; returns the exit code."""
    options = tyro.cli(Options, args=list(words), prog="python -m train demo-chat")
    console, began = Console(), time.monotonic()
    folder = emptied(Path(options.folder), {name for name, _ in METHODS.values()})
    console.print("fetching SmolLM2-135M-Instruct and the instructions (kept for next time) ...")
    model, rows = fetch_smollm2(assets_cache()), fetch_alpaca_demo(assets_cache())
    runs: dict[str, Run] = {}
    answers: Answers = {}
    for number, (name, (part, n)) in enumerate(METHODS.items(), start=1):
        console.rule(f"{number} of {len(METHODS)}: {name}, learning rate {options.learning_rate:g}")
        experiment = prepare(_config(n, folder / part, options, model, rows))
        if not answers:
            # An adapter starts at zero, so this is the model before training.
            answers["before"] = _answers(experiment.model, model, options)
        outcome = run(experiment)
        if outcome.stopped_by:
            console.print(describe_stop(outcome, experiment.folder), soft_wrap=True)
            return exit_code(outcome)
        finish(experiment)
        answers[name] = _answers(experiment.model, model, options)
        runs[name] = read_run(experiment.folder)
    page = write_comparison(folder, runs, "MELoRA on instructions", _commands(folder, model))
    console.rule("held-out loss on 97 instructions, tokens of answers")
    console.print(_table(runs))
    _show(console, answers)
    console.print(f"Report: {page}", soft_wrap=True)
    for what, command in _commands(folder, model).items():
        console.print(f"{what}:\n  {command}", soft_wrap=True, markup=False, highlight=False)
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")
    return 0


def _config(n: int, folder: Path, options: Options, model: Path, rows: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=str(model), task="causal-lm"),
        adapter=AdapterConfig(n=n, r=8, targets=("q_proj", "v_proj"), modules_to_save=()),
        data=DataConfig(train=str(rows / "train.jsonl"), validation=str(rows / "validation.jsonl"), max_length=512),
        instruction=InstructionConfig(chunk=512),
        optim=OptimConfig(learning_rate=options.learning_rate),
        train=TrainConfig(
            epochs=100,
            max_steps=options.steps,
            batch_size=options.batch_size,
            eval_batch_size=1,
            eval_every=max(1, options.steps // 2),
            eval_at_start=True,
            seed=options.seed,
            metric="loss",
        ),
        output=OutputConfig(str(folder)),
    )


def _answers(model: Any, name: Path, options: Options) -> list[str]:
    """The model's answer to each prompt, its likeliest tokens."""
    tokenizer = read_tokenizer(str(name))
    speaker = Speaker(model, tokenizer, make_template(tokenizer, "chat"), Manner(max_new_tokens=options.answer_tokens))
    answers = speaker.answer([speaker.prompt_ids(Conversation((Turn("user", prompt),))) for prompt in PROMPTS])
    for _ in answers:
        pass
    return answers.texts


def _table(runs: dict[str, Run]) -> Table:
    headers = ("method", "adapter parameters", "ΔW rank", "loss before", "loss after", "seconds")
    rows = []
    for name, one in runs.items():
        first, best = one.evaluations[0]["loss"], (one.best or {})["loss"]
        seconds = float(one.last["seconds"])
        rows.append([name, f"{one.adapter:,}", rank_range(one), f"{first:.4f}", f"{best:.4f}", f"{seconds:.0f}"])
    return terminal_table(headers, rows)


def _show(console: Console, answers: Answers) -> None:
    for place, prompt in enumerate(PROMPTS):
        console.rule(prompt, align="left")
        for name, texts in answers.items():
            console.print(f"[bold]{name}[/]: ", end="")
            console.print(texts[place].strip(), markup=False, highlight=False)


def _commands(folder: Path, model: Path) -> dict[str, str]:
    part = METHODS["MELoRA n=8 r=8"][0]
    return {
        "Talk to it": f"python -m train generate {model} --adapter {folder / part}",
        "Your own conversations": "python -m train run train/recipes/chat.toml --data.train my_chats.jsonl",
    }
