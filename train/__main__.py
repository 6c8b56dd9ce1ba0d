"""`python -m train COMMAND`: fine-tune, generate, compare and measure."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from train.process import prepare_process
from train.run_folder.errors import RunError

# command: (module:function, its words, what it does)
COMMANDS = {
    "run": (
        "train.commands.run:run",
        "RECIPE.toml [--section.key value ...] [--resume]",
        "fine-tune a model; --help after the recipe lists all keys",
    ),
    "sweep": (
        "train.commands.sweep:sweep",
        "RECIPE.toml [--seeds 8] [--grid KEY=V,V ...]",
        "train a grid of runs, those of equal shapes in one step",
    ),
    "generate": (
        "train.commands.generate:generate",
        "MODEL [--adapter FOLDER] [--prompt TEXT]",
        "answer prompts, by default those typed; --help lists all keys",
    ),
    "demo": ("train.demo.reviews:demo", "[--help]", "compare head only, LoRA and MELoRA on real movie reviews"),
    "demo-chat": (
        "train.demo.chat:demo_chat",
        "[--help]",
        "tune a small chat model by LoRA and MELoRA; see it answer",
    ),
    "eval": (
        "train.harness.command:evaluate",
        "MODEL --tasks mmlu,... [--adapter FOLDER]",
        "score a decoder on lm-eval's tasks; --help lists all keys",
    ),
    "report": ("train.commands.report:report", "FOLDER", "write FOLDER/report.html again"),
    "glue": (
        "train.commands.glue:glue",
        "[--tasks all] [--methods lora melora:n=8] [...]",
        "tasks by methods by seeds, each at its best learning rate",
    ),
    "study": ("train.commands.study:study", "FOLDER [...]", "a table's page, figures and data again"),
    "plan": (
        "train.commands.plan:plan",
        "RECIPE.toml --device v5e-8 [...]",
        "say whether a run fits into memory, from shapes alone",
    ),
    "crash-test": (
        "train.lab.crash.crashes:crash_test",
        "RECIPE.toml [--kills 30]",
        "kill a run at random moments, resume it, compare the ends",
    ),
    "bench": ("train.lab.bench.bench:bench", "[--help]", "time MELoRA and LoRA against the frozen model"),
    "bench-population": (
        "train.lab.bench.population:bench_population",
        "[--help]",
        "time 8 runs in one step against 8 one after another",
    ),
}


def main(words: Sequence[str]) -> int:
    """Runs one command. 0: done; 2: bad input, found before work began; 1: an error in mid-run."""
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    command, *rest = words
    try:
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}; choose {', '.join(COMMANDS)}")
        # standard output is what generate generates, and may go into a file
        prepare_process(sys.stderr if command == "generate" else sys.stdout)
        module, function = COMMANDS[command][0].split(":")
        return getattr(importlib.import_module(module), function)(rest)
    except RunError as error:
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)


def usage() -> str:
    """The commands, each with its words and what it does."""
    lines = [f"  {f'{name} {words}':<54} {does}" for name, (_, words, does) in COMMANDS.items()]
    example = "python -m train run train/recipes/local.toml --data.train my.jsonl --data.validation held_out.jsonl"
    return "\n".join(["usage: python -m train COMMAND ...", "", *lines, "", f"example: {example}"])


def _fail(message: str, code: int) -> int:
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True, highlight=False
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
