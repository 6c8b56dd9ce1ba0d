"""Which runs can be trained as one population: those that differ in numbers alone, not in shapes, code or data."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melora_jax.adapters import kind_of
from train.config.run_config import RunConfig, to_toml

# What members of one population may differ in; `train.data_seed` where each member sees its own order of rows.
VARYING = (
    "optim.learning_rate",
    "optim.head_learning_rate",
    "optim.b_learning_rate",
    "optim.weight_decay",
    "adapter.alpha",
    "adapter.dropout",
    "train.seed",
    "train.data_seed",
    "train.warm_start",
    "output.folder",
)


def group(configs: Sequence[RunConfig]) -> list[list[int]]:
    """The configurations that make a population each, by their places in `configs`, in the order of first appearance.

    Runs on a mesh, and of many hosts, are refused by `require_population`, not here.
    """
    groups: dict[str, list[int]] = {}
    for place, config in enumerate(configs):
        groups.setdefault(repr(sorted(_fixed(config).items())), []).append(place)
    return list(groups.values())


def require_population(configs: Sequence[RunConfig]) -> None:
    """Raises ValueError where `configs` can't be one population; the message names the key."""
    if not configs:
        raise ValueError("a population of no runs; give at least one configuration")
    first = _fixed(configs[0])
    for config in configs[1:]:
        other = _fixed(config)
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{key} is {first.get(key)!r} in one run and {other.get(key)!r} in another, and a population can't "
                    f"vary it; make it two populations (train.members.group does), or vary {', '.join(VARYING[:-1])}"
                )
    for config in configs:
        _require_one_device(config)
    folders = [Path(config.output.folder).resolve() for config in configs]
    if twice := [str(folder) for place, folder in enumerate(folders) if folder in folders[:place]]:
        raise ValueError(f"two runs have the output.folder {twice[0]}; give each its own")


def _require_one_device(config: RunConfig) -> None:
    hosts = config.distributed
    if set(config.mesh.sizes.values()) != {1}:
        sizes = ", ".join(f"mesh.{name}={size}" for name, size in config.mesh.sizes.items() if size != 1)
        raise ValueError(f"{sizes}: a population runs on one device so far; unset it, or make the runs one by one")
    if hosts.cluster != "none" or hosts.coordinator is not None:
        raise ValueError("[distributed]: a population runs on one device so far; unset it")


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The settings by key, less those that members may differ in."""
    tables = tomllib.loads(to_toml(config))
    settings = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    varying = set(VARYING)
    if config.adapter.alpha_pattern or isinstance(config.melora.alpha, tuple):
        varying.remove("adapter.alpha")  # one factor on all of a member's adapters would not do
    elif not kind_of(config.melora).alpha_varies:
        varying.remove("adapter.alpha")  # nor where alpha is more than a factor of the update
    return {key: value for key, value in settings.items() if key not in varying}
