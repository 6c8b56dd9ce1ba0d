"""The run's configuration: a recipe, command-line overrides, and the checks on both."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import tyro

from train.config.methods import Method, check_adalora, resolve_method
from train.config.recipe import check_options, read_recipe
from train.config.schema import OutputConfig, Sections
from train.config.tasks import glue_task, metric_names

_LEAST_POSITIVE = math.ulp(0.0)
_COUNT, _RATE, _SHARE = (1, math.inf), (_LEAST_POSITIVE, math.inf), (0, 1)
# key → (least value, bound that no value reaches)
_BOUNDS: dict[str, tuple[float, float]] = {
    "data.max_length": (8, math.inf),
    "data.train_limit": _COUNT,
    "data.eval_limit": _COUNT,
    "data.held_back": _COUNT,
    "instruction.held_out": _COUNT,
    "instruction.chunk": _COUNT,
    "optim.learning_rate": _RATE,
    "optim.head_learning_rate": _RATE,
    "optim.b_learning_rate": _RATE,
    "optim.weight_decay": (0, math.inf),
    "optim.beta1": _SHARE,
    "optim.beta2": _SHARE,
    "optim.epsilon": _RATE,
    "optim.warmup_ratio": _SHARE,
    "optim.clip_norm": _RATE,
    "train.epochs": _COUNT,
    "train.max_steps": _COUNT,
    "train.batch_size": _COUNT,
    "train.accumulate": _COUNT,
    "train.seed": (0, 2**32),
    "train.data_seed": (0, 2**32),
    "train.eval_every": _COUNT,
    "train.eval_batch_size": _COUNT,
    "train.patience": _COUNT,
    "train.log_every": _COUNT,
}


@dataclasses.dataclass(frozen=True)
class RunConfig(Sections):
    """A complete, checked configuration. (`Sections` alone are what a recipe says before overrides, unchecked.)

    Raises:
      ValueError: a value out of range, or values that contradict each other; the message names the key.

    >>> from train.config.schema import DataConfig, ModelConfig
    >>> config = RunConfig(ModelConfig("bert"), data=DataConfig(name="glue/cola"), output=OutputConfig("runs/cola"))
    >>> config.metric, config.method.settings.n
    ('matthews', 8)
    """

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)
        try:
            _ = self.method  # resolved here, for its errors
        except ValueError as error:
            raise ValueError(f"[adapter] {error}") from None

    @functools.cached_property
    def method(self) -> Method:
        """What the run trains, and how."""
        return resolve_method(self)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of an evaluation, in the order they are shown."""
        return metric_names(self.data.name, self.model.task)

    @property
    def metric(self) -> str:
        """The metric, or loss, that ranks checkpoints."""
        return self.train.metric or self.metrics[0]

    @property
    def data_seed(self) -> int:
        """The seed of the order of rows."""
        return self.train.seed if self.train.data_seed is None else self.train.data_seed

    def _problems(self) -> Iterator[str]:
        if not self.model.name:
            yield "model.name is not set; give a folder or a hub id, e.g. --model.name FacebookAI/roberta-base"
        if not self.output.folder:
            yield "output.folder is not set; give a folder, e.g. --output.folder runs/first"
        for key, (least, bound) in _BOUNDS.items():
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            if value is not None and not least <= value < bound:
                low = "above 0" if least == _LEAST_POSITIVE else f"at least {least}"
                yield f"{key}={value!r} must be {low} and " + ("finite" if bound == math.inf else f"below {bound}")
        yield from check_adalora(self)
        yield from self._data_problems()
        yield from self._train_problems()
        yield from self._device_problems()

    def _data_problems(self) -> Iterator[str]:
        data, task = self.data, self.model.task
        drawn = self.instruction.held_out is not None
        files = (data.train,) if drawn else (data.train, data.validation)
        glue = glue_task(data.name)
        named = bool(data.name) and not (glue and any(files))
        if named == any(files) or any(files) != all(files):
            given = f"data.name={data.name!r}, data.train={data.train!r}, data.validation={data.validation!r}"
            yield f"{given}: give data.name (a hub data set), or both files; unset a key by the word None"
        if data.held_back is not None and task == "causal-lm":
            yield f"data.held_back={data.held_back} belongs to labelled rows; hold out with instruction.held_out"
        if drawn and task != "causal-lm":
            yield f"instruction.held_out={self.instruction.held_out} belongs to model.task=causal-lm; unset it"
        if drawn and (data.validation or data.validation_split):
            yield "instruction.held_out draws the held-out rows; unset data.validation and data.validation_split"
        if data.subset and (glue or not data.name):
            yield f"data.subset={data.subset!r} chooses within a hub data set other than glue/...; unset it"
        if data.validation_split and not data.name:
            yield f"data.validation_split={data.validation_split!r} chooses within a hub data set; unset it"
        if glue and glue.task != task:
            yield f"data.name={data.name!r} is a {glue.task} task, not {task}; set model.task to {glue.task}"
        if len(data.text) > 2 or len({*data.text, data.label}) <= len(data.text):
            columns = f"data.text={list(data.text)} and data.label={data.label!r}"
            yield f"{columns} must be different columns, one or two of text"
        if data.label_names and task != "classification":
            yield "data.label_names belongs to classification; unset it, or set model.task to classification"
        if data.label_names and len(set(data.label_names)) < max(2, len(data.label_names)):
            yield f"data.label_names={list(data.label_names)} must be two or more different names"
        if not data.buckets or min(data.buckets) < 1 or sorted(set(data.buckets)) != list(data.buckets):
            yield f"data.buckets={list(data.buckets)} must be rising widths of at least 1, e.g. [32, 64, 128]"

    def _train_problems(self) -> Iterator[str]:
        batch, parts = self.train.batch_size, self.train.accumulate
        if batch % parts:
            divisors = ", ".join(str(k) for k in range(1, batch + 1) if batch % k == 0)
            yield f"train.accumulate={parts} does not divide train.batch_size={batch}; choose from {divisors}"
        if self.metric not in (*self.metrics, "loss"):
            yield f"train.metric={self.metric!r} is not computed here; choose from {', '.join(self.metrics)}, loss"

    def _device_problems(self) -> Iterator[str]:
        sizes, hosts = self.mesh.sizes, self.distributed
        for name, size in sizes.items():
            if size < 1 and size != -1:
                yield f"mesh.{name}={size} must be at least 1, or -1 for the rest of the devices"
        if list(sizes.values()).count(-1) > 1:
            yield "only one of mesh.data, mesh.fsdp and mesh.tensor can be -1, the rest of the devices"
        told = (hosts.coordinator, hosts.processes, hosts.process)
        if hosts.cluster == "auto" and told != (None,) * 3:
            yield "distributed.cluster=auto finds the processes; unset coordinator, processes and process"
        if None in told and told != (None,) * 3:
            given = f"coordinator={told[0]!r}, processes={told[1]}, process={told[2]}"
            yield f"distributed: {given}: give all three, e.g. coordinator=10.0.0.1:1234, processes=2 and process=0"
        if hosts.processes is not None and hosts.process is not None and not 0 <= hosts.process < hosts.processes:
            yield f"distributed.process={hosts.process} must be below distributed.processes={hosts.processes}"


def from_toml(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a recipe with `--section.key value` words put over it; among them, `--help` lists all keys.

    Without output.folder, results go to runs/ and the recipe's name.

    Raises:
      ValueError: no such file, not TOML, an unknown key or option, a wrong type in the file, a bad value.
      SystemExit: an option's value does not parse, which is printed, with code 2; or `--help`, with code 0.
    """
    check_options(overrides)
    sections = read_recipe(Path(path))
    if not sections.output.folder:
        sections = dataclasses.replace(sections, output=OutputConfig(f"runs/{Path(path).stem}"))
    program = f"python -m train run {path}"
    # tyro gets the unchecked sections: what their checks raised inside it would come out as a box of several lines.
    sections = tyro.cli(Sections, default=sections, args=list(overrides), prog=program, use_underscores=True)
    return RunConfig(**vars(sections))


def texts_of(config: RunConfig, resume: bool) -> dict[str, str]:
    """What every process of a run must have been started with alike, by section."""
    return {f"[{name}]": tomli_w.dumps(table) for name, table in _tables(config).items()} | {"--resume": str(resume)}


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML, which `from_toml` reads back to an equal one; None and {} are left out.

    So is the number of the process, the one thing in which processes of a run differ.
    """
    return tomli_w.dumps(_tables(config))


def _tables(config: RunConfig) -> dict[str, dict[str, Any]]:
    tables = dataclasses.asdict(config)
    tables["distributed"]["process"] = None
    return {
        name: {key: value for key, value in table.items() if value not in (None, {})} for name, table in tables.items()
    }
