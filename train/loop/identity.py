"""What a run is, as its folder states it, and whether a folder holds that run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import melora_jax as mj
from train.config.recipe import parse_recipe
from train.config.run_config import RunConfig, to_toml
from train.config.schema import Sections
from train.hosts.hosts import is_first
from train.loop.checkpoint import Notes
from train.loop.setup import Experiment
from train.run_folder.folder import population_of, resume_command
from train.run_folder.leftovers import clear_leftovers
from train.run_folder.log import replace_text

# Settings that may change between the parts of a run: they touch neither the weights nor the order of the data.
_FREE = ("output.folder", "train.log_every", "train.tensorboard", "train.patience")
# Nor do the devices: a run may continue on any others.
_FREE_SECTIONS = ("mesh", "distributed")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def check_folder(folder: Path, resume: bool) -> None:
    """Raises ValueError where a new run would meet another in `folder`, or a resumed one no run at all."""
    started = (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()
    if resume and not started:
        raise ValueError(f"{folder} holds no checkpoint to resume from; start the run without --resume")
    if started and population_of(folder) is not None:
        raise ValueError(
            f"{folder} is part of a population; continue that with `{resume_command(folder)}`, or choose another "
            "--output.folder"
        )
    if started and not resume:
        raise ValueError(
            f"{folder} holds a run already; continue it with `{resume_command(folder)}`, or choose another "
            "--output.folder"
        )


def enter_folders(experiments: Sequence[Experiment], notes: Notes | None, resume: bool) -> None:
    """Says in the folder of each run what it is, and removes what killed writes left there.

    Args:
      experiments: the runs of a cohort.
      notes: those of the newest checkpoint; None if there is none.
      resume: whether a folder may be of a run that left no checkpoint, if it came so far as to say what it is.

    Raises:
      ValueError: the checkpoint, or a folder, is of other runs; nothing was changed.
    """
    if notes is not None and len(notes.members) != len(experiments):
        raise ValueError(
            f"the population had {len(notes.members)} members, and not {len(experiments)}; resume it as it was"
        )
    for place, experiment in enumerate(experiments):
        stated = experiment.folder / "config.toml"
        if notes is not None:
            check_config(experiment.config, notes.members[place].config)
        elif resume and stated.exists():
            check_config(experiment.config, stated.read_text(encoding="utf-8"))
    for experiment in experiments:
        if is_first():
            experiment.folder.mkdir(parents=True, exist_ok=True)
            _write_facts(experiment)
            clear_leftovers(experiment.folder)


def check_config(config: RunConfig, saved: str) -> None:
    """A resumed run must be the same run."""
    folder = Path(config.output.folder)
    here, there = settings(config), settings(parse_recipe(saved.encode(), folder / "config.toml"))
    for key, ours in here.items():
        if ours != there[key] and key not in _FREE and key.partition(".")[0] not in _FREE_SECTIONS:
            raise ValueError(
                f"{key} is {ours!r}, but {there[key]!r} in the run that {folder} holds; resume it as it was: "
                f"`{resume_command(folder)}`"
            )


def settings(config: Sections) -> dict[str, Any]:
    """Every key with its section, and its value.

    >>> settings(Sections())["optim.learning_rate"]
    0.0004
    """
    tables = dataclasses.asdict(config)
    return {f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()}


def _write_facts(experiment: Experiment) -> None:
    """The files that say what the run is."""
    folder = experiment.folder
    replace_text(folder / "config.toml", to_toml(experiment.config))
    _write_json(folder / "sites.json", experiment.adaptation.to_dict())
    versions = {name: version(name) for name in _PACKAGES}
    _write_json(
        folder / "versions.json", {"melora_jax": mj.__version__} | versions | {"backend": jax.default_backend()}
    )


def _write_json(path: Path, values: Any) -> None:
    replace_text(path, json.dumps(values, indent=2) + "\n")
