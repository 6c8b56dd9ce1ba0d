"""`python -m train COMMAND`: fine-tune, generate, compare and measure."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from train.loop.memory import use_one_arena
from train.run_folder.errors import RunError

USAGE = """usage: python -m train COMMAND ...

  run RECIPE.toml [--section.key value ...] [--resume]   fine-tune a model; --help after the recipe lists all keys
  sweep RECIPE.toml [--seeds 8] [--grid KEY=V,V ...]     train a grid of runs, those of equal shapes in one step
  generate MODEL [--adapter FOLDER] [--prompt TEXT]      answer prompts, by default those typed; --help lists all keys
  demo [--help]                                          compare head only, LoRA and MELoRA on real movie reviews
  demo-chat [--help]                                     tune a small chat model by LoRA and MELoRA; see it answer
  eval MODEL --tasks mmlu,... [--adapter FOLDER]         score a decoder on lm-eval's tasks; --help lists all keys
  report FOLDER                                          write FOLDER/report.html again
  glue [--tasks all] [--methods lora melora:n=8] [...]   tasks by methods by seeds, each at its best learning rate
  study FOLDER [...]                                     a table's page, figures and data again
  plan RECIPE.toml --device v5e-8 [...]                  say whether a run fits into memory, from shapes alone
  crash-test RECIPE.toml [--kills 30]                    kill a run at random moments, resume it, compare the ends
  bench [--help]                                         time MELoRA and LoRA against the frozen model
  bench-population [--help]                              time 8 runs in one step against 8 one after another

example: python -m train run train/recipes/local.toml --data.train my.jsonl --data.validation held_out.jsonl"""


def command_run(words: Sequence[str]) -> int:
    """One fine-tuning run."""
    from train.config.run_config import from_toml, settings_of
    from train.hosts.hosts import is_first, join, meet, require_equal
    from train.loop.finish import finish
    from train.loop.loop import describe_stop, exit_code, run
    from train.loop.setup import prepare

    if not words or words[0].startswith("-"):
        raise ValueError(
            "which recipe? e.g. python -m train run train/recipes/local.toml; --help after it lists all keys"
        )
    resume = "--resume" in words
    config = from_toml(words[0], [word for word in words[1:] if word != "--resume"])
    join(config.distributed)
    require_equal(settings_of(config, resume), "start every host with the same recipe and options")
    experiment = prepare(config)
    outcome = run(experiment, resume)
    if not is_first():
        meet("the results are written")
        return exit_code(outcome)
    if outcome.stopped_by:
        print(describe_stop(outcome, experiment.folder))
        meet("the results are written")
        return exit_code(outcome)
    if outcome.best is None:
        raise RunError(
            f"no evaluation gave a {config.metric}; the newest checkpoint is in {experiment.folder / 'checkpoints'}"
        )
    print(f"best {config.metric} {outcome.best:.4f}")
    print("\n".join(finish(experiment)))
    meet("the results are written")
    return 0


def command_sweep(words: Sequence[str]) -> int:
    """A grid of runs, trained as populations."""
    from train.commands.sweep import sweep

    return sweep(words)


def command_generate(words: Sequence[str]) -> int:
    """Text from a decoder, plain or fine-tuned."""
    from train.commands.generate import generate

    return generate(words)


def command_eval(words: Sequence[str]) -> int:
    """A decoder, plain or fine-tuned, on tasks of lm-eval."""
    from train.harness.command import evaluate

    return evaluate(words)


def command_demo(words: Sequence[str]) -> int:
    """The four methods of `make demo`."""
    from train.demo.reviews import demo

    return demo(words)


def command_demo_chat(words: Sequence[str]) -> int:
    """The two methods of `make demo-chat`."""
    from train.demo.chat import demo_chat

    return demo_chat(words)


def command_report(words: Sequence[str]) -> int:
    """The report of a run, from its folder's files."""
    from train.report.report import write_report

    if len(words) != 1:
        raise ValueError("which run? e.g. python -m train report runs/local")
    print(write_report(Path(words[0])))
    return 0


def command_bench(words: Sequence[str]) -> int:
    """Step times as ratios."""
    from train.lab.bench.bench import bench

    return bench(words)


def command_glue(words: Sequence[str]) -> int:
    """A table of GLUE tasks by methods."""
    from train.commands.glue import glue

    return glue(words)


def command_study(words: Sequence[str]) -> int:
    """What a table says about n and r."""
    from train.commands.study import study

    return study(words)


def command_bench_population(words: Sequence[str]) -> int:
    """A population's step against those of its members."""
    from train.lab.bench.population import bench_population

    return bench_population(words)


def command_plan(words: Sequence[str]) -> int:
    """The memory of a run, before it is made."""
    from train.commands.plan import plan

    return plan(words)


def command_crash_test(words: Sequence[str]) -> int:
    """A run killed at random moments, against one left alone."""
    from train.lab.crash.crashes import crash_test

    return crash_test(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": command_run,
    "sweep": command_sweep,
    "generate": command_generate,
    "eval": command_eval,
    "demo": command_demo,
    "demo-chat": command_demo_chat,
    "report": command_report,
    "bench": command_bench,
    "glue": command_glue,
    "study": command_study,
    "bench-population": command_bench_population,
    "plan": command_plan,
    "crash-test": command_crash_test,
}


def main(words: Sequence[str]) -> int:
    """Runs one command. 0: done; 2: bad input, found before work began; 1: an error in mid-run."""
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    try:
        if words[0] not in COMMANDS:
            raise ValueError(f"unknown command {words[0]!r}; choose {', '.join(COMMANDS)}")
        _quiet_transformers()
        # standard output is what generate generates, and may go into a file
        _show_library_log(sys.stderr if words[0] == "generate" else sys.stdout)
        use_one_arena()
        _cache_compilations()
        return COMMANDS[words[0]](words[1:])
    except RunError as error:
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)


def _show_library_log(stream: TextIO) -> None:
    """What the library has to say goes to the screen as it is."""
    logger = logging.getLogger("melora_jax")
    logger.handlers = [logging.StreamHandler(stream)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _quiet_transformers() -> None:
    """It gives tokenizers here; that it misses torch for its models is nobody's concern."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _cache_compilations() -> None:
    """XLA keeps what it compiled for the next run, unless the user chose a place or none."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "melora_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _fail(message: str, code: int) -> int:
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True, highlight=False
    )
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
