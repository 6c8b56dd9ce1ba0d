"""`python -m train run RECIPE.toml`: one fine-tuning run, on one host or many."""

from __future__ import annotations

from collections.abc import Sequence

from train.config.run_config import from_toml, texts_of
from train.hosts.hosts import is_first, join_hosts, meet, require_equal
from train.loop.best import finish
from train.loop.loop import describe_stop, exit_code
from train.loop.loop import run as train_run
from train.loop.setup import prepare
from train.run_folder.errors import RunError


def run(words: Sequence[str]) -> int:
    """Trains, and writes what is made of the best model; returns the exit code."""
    if not words or words[0].startswith("-"):
        raise ValueError(
            "which recipe? e.g. python -m train run train/recipes/local.toml; --help after it lists all keys"
        )
    resume = "--resume" in words
    config = from_toml(words[0], [word for word in words[1:] if word != "--resume"])
    join_hosts(config.distributed)
    require_equal(texts_of(config, resume), "start every host with the same recipe and options")
    experiment = prepare(config)
    outcome = train_run(experiment, resume)
    if is_first() and outcome.stopped_by:
        print(describe_stop(outcome, experiment.folder))
    elif is_first():
        if outcome.best is None:
            raise RunError(
                f"no evaluation gave a {config.metric}; the newest checkpoint is in {experiment.folder / 'checkpoints'}"
            )
        print(f"best {config.metric} {outcome.best:.4f}")
        print("\n".join(finish(experiment)))
    meet("the results are written")
    return exit_code(outcome)
