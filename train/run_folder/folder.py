"""What the folder of a run says about it: the one place that reads a run's files for reports and comparisons."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from melora_jax.core import numerical_rank
from train.config.methods import method_name
from train.run_folder.log import Event, read_metrics

POPULATION = "population.json"
_NOT_METRICS = ("step", "epoch", "seconds", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted layer, as sites.json states it. `r` is one rank a mini; `scaling` and the rest are shown as text."""

    path: str
    d_in: int
    d_out: int
    n: int
    r: list[int]
    rank: int
    parameters: int
    scaling: Any
    mixer: str
    strategy: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder, read. `spectra` maps site paths to singular values of ΔW; it and `versions` may be empty.

    `adapter`, `base`, `head` and `frozen` are numbers of parameters; those of the base are trained without an adapter.
    """

    folder: Path
    config_text: str
    config: Mapping[str, Any]
    events: list[Event]
    sites: list[Site]
    trainable: int
    adapter: int
    head: int
    frozen: int
    base: int = 0
    spectra: Mapping[str, npt.NDArray[np.float64]]
    versions: Mapping[str, str]

    @functools.cached_property
    def steps(self) -> list[Event]:
        """The train events, in order."""
        return [event for event in self.events if event["kind"] == "train"]

    @functools.cached_property
    def evaluations(self) -> list[Event]:
        """The eval events, in order."""
        return [event for event in self.events if event["kind"] == "eval"]

    @property
    def best(self) -> Event | None:
        """The latest evaluation that was the best so far; None before the first."""
        marked = [event for event in self.evaluations if event.get("best") is True]
        return marked[-1] if marked else None

    @property
    def metrics(self) -> list[str]:
        """The evaluations' metrics: the one that ranks checkpoints, the others as they were logged, `loss` last."""
        logged = dict.fromkeys(key for event in self.evaluations for key, value in event.items() if _is_number(value))
        names = [name for name in logged if name not in _NOT_METRICS] + [name for name in logged if name == "loss"]
        ranking = self.setting("train", "metric")
        return sorted(names, key=lambda name: name != ranking)

    @property
    def last(self) -> Mapping[str, Any]:
        """The last train event; empty before the first."""
        return self.steps[-1] if self.steps else {}

    @property
    def last_step(self) -> int:
        """The number of steps done, as far as logged."""
        return int(max((event["step"] for event in self.events), default=0))

    @property
    def seconds_per_epoch(self) -> float | None:
        """Elapsed time over epochs done, evaluations and compiling included; None before the first train event."""
        epochs = float(self.last.get("epoch", 0.0))
        return float(self.last.get("seconds", 0.0)) / epochs if epochs else None

    @functools.cached_property
    def ranks(self) -> list[int]:
        """The distinct numerical ranks of the stored ΔW, ascending."""
        return sorted({numerical_rank(values) for values in self.spectra.values()})

    def setting(self, section: str, key: str) -> Any:
        """One entry of config.toml; None where it is absent."""
        table = self.config.get(section)
        return table.get(key) if isinstance(table, Mapping) else None

    @property
    def model(self) -> str:
        """The model's hub id, or of a folder given by its absolute path the last part."""
        name = str(self.setting("model", "name") or "")
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def data(self) -> str:
        """The data set's name, or the name of the file of training rows."""
        names = [self.setting("data", key) for key in ("name", "subset")]
        return " ".join(str(name) for name in names if name) or Path(str(self.setting("data", "train") or "")).name

    @property
    def method(self) -> str:
        """What was trained: "MELoRA n=8 r=1", "LoRA r=8", "GraLoRA n=4 r=8", "BitFit" or "head only"."""
        n, r, mixer, word = (self.setting("adapter", key) for key in ("n", "r", "mixer", "method"))
        name = method_name(str(word)) or "MELoRA"
        if not self.sites:
            return name if self.base else "head only"
        n, r = n or self.sites[0].n, r or _one_of(self.sites[0].r)
        if name == "MELoRA":
            name = "LoRA" if n == 1 or mixer == "all" else {"shuffle": "GraLoRA"}.get(str(mixer), name)
        return f"{name} r={r}" if n == 1 or mixer == "all" else f"{name} n={n} r={r}"

    @property
    def beside_head(self) -> int:
        """Parameters that were trained outside of the head: adapters, and the base's own."""
        return self.adapter + self.base

    @property
    def commands(self) -> dict[str, str]:
        """What to do next → the command that does it."""
        commands = {"Continue this run from its newest checkpoint": resume_command(self.folder)}
        if (self.folder / "peft").is_dir():
            load = f"model = peft.PeftModel.from_pretrained(base, {str(self.folder / 'peft')!r})"
            commands[f"Load the best adapter into PEFT, where base is {self.model} of transformers"] = load
        return commands


def _one_of(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def resume_command(folder: Path) -> str:
    """The command that continues the run in `folder`: its own, or that of the population it is a member of."""
    if (words := population_of(folder)) is not None:
        return shlex.join(words)
    return f"python -m train run {shlex.quote(str(folder / 'config.toml'))} --resume"


def population_of(folder: Path) -> list[str] | None:
    """The words of the command that made the run as a member of a population; None for a run of its own."""
    path = folder / POPULATION
    if not path.exists():
        return None
    return [str(word) for word in _checked(_json_object(path), "resume", list, path)]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Reads config.toml, metrics.jsonl, sites.json and, where present, spectra.json and versions.json.

    Raises:
      ValueError: a file is missing or malformed; names the file, what is wrong and the remedy.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give the folder of a run of `python -m train run`")
    config_text = _text(folder / "config.toml")
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{folder / 'config.toml'} is not TOML ({error}); restore it from the recipe") from error
    sites_path = folder / "sites.json"
    sites = _json_object(sites_path)
    counts = {name: _checked(sites, name, int, sites_path) for name in ("trainable", "adapter", "head", "frozen")}
    if "base" in sites:  # earlier versions trained nothing of the base
        counts["base"] = _checked(sites, "base", int, sites_path)
    return Run(
        folder=folder,
        config_text=config_text,
        config=config,
        events=read_metrics(folder),
        sites=[_site(entry, sites_path) for entry in _checked(sites, "sites", list, sites_path)],
        spectra=_spectra(folder / "spectra.json"),
        versions={name: str(version) for name, version in _optional_object(folder / "versions.json").items()},
        **counts,
    )


def _site(entry: object, path: Path) -> Site:
    if not isinstance(entry, dict):
        raise ValueError(f"{path} has a site that is not a JSON object; {_REMEDY}")
    types = {"path": str, "r": list, "scaling": object, "mixer": str, "strategy": str}
    names = [field.name for field in dataclasses.fields(Site)]
    return Site(**{name: _checked(entry, name, types.get(name, int), path) for name in names})


def _spectra(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    spectra = {}
    for site, values in _optional_object(path).items():
        if not isinstance(values, list) or not values or not all(_is_number(value) for value in values):
            raise ValueError(f'{path} has no list of singular values at "{site}"; {_REMEDY}')
        array = np.sort(np.asarray(values, dtype=np.float64))[::-1]
        if not np.isfinite(array).all() or array[-1] < 0:
            raise ValueError(f'{path} has a singular value that is negative or not finite at "{site}"; {_REMEDY}')
        spectra[site] = array
    return spectra


_REMEDY = "it is written at the end of a run: run again, or delete what was edited"


def _checked(entry: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    value = entry.get(name)
    if value is None or not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f'{path} lacks "{name}" ({kind.__name__}); {_REMEDY}')
    return value


def _optional_object(path: Path) -> dict[str, Any]:
    return _json_object(path) if path.exists() else {}


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; {_REMEDY}")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name} in {path.parent}; give the folder of a finished run") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); {_REMEDY}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
