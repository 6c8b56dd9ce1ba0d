"""What a run is, as its folder states it, and whether a folder holds that run."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import melora_jax as mj
from train.config.run_config import RunConfig, to_toml
from train.loop.setup import Experiment
from train.run_folder.folder import population_of, resume_command
from train.run_folder.log import replace_text

# Settings that may change between the parts of a run: they touch neither the weights nor the order of the data.
_FREE = (("output", "folder"), ("train", "log_every"), ("train", "tensorboard"), ("train", "patience"))
# Nor do the devices: a run may go on on any others.
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


def check_started(experiment: Experiment) -> None:
    """`check_config` for a run that left no checkpoint, if it came so far as to say what it is."""
    stated = experiment.folder / "config.toml"
    if stated.exists():
        check_config(experiment.config, stated.read_text(encoding="utf-8"))


def check_config(config: RunConfig, saved: str) -> None:
    """A resumed run must be the same run."""
    folder = Path(config.output.folder)
    here, there = tomllib.loads(to_toml(config)), tomllib.loads(saved)
    for section in here.keys() | there.keys():
        for key in here.get(section, {}).keys() | there.get(section, {}).keys():
            ours, theirs = (table.get(section, {}).get(key) for table in (here, there))
            if ours != theirs and (section, key) not in _FREE and section not in _FREE_SECTIONS:
                raise ValueError(
                    f"{section}.{key} is {ours!r}, but {theirs!r} in the run that {folder} holds; resume it as it was: "
                    f"`{resume_command(folder)}`"
                )


def write_facts(experiment: Experiment) -> None:
    """The files that say what the run is."""
    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.toml", to_toml(experiment.config))
    _write_json(folder / "sites.json", experiment.adaptation.to_dict())
    versions = {name: version(name) for name in _PACKAGES}
    _write_json(
        folder / "versions.json", {"melora_jax": mj.__version__} | versions | {"backend": jax.default_backend()}
    )


def _write_json(path: Path, values: Any) -> None:
    replace_text(path, json.dumps(values, indent=2) + "\n")
