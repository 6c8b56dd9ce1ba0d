"""The plan of a table: the runs of its rows, all checked before the first begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from train.config.recipe import RECIPES
from train.config.run_config import RunConfig, from_toml
from train.config.tasks import GLUE
from train.data.files import READERS
from train.lab.tables.arms import Arm, arms_from_words

# The eight tasks of the paper's table, in its order; the paper leaves out WNLI too.
TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
WARM_STARTED = ("mrpc", "rte", "stsb")


@dataclasses.dataclass(frozen=True)
class Row:
    """A task and an arm: `rates` to choose from on rows held back from training, then `seeds` at the best of them.

    Seeds draw heads, adapters and dropout. All seeds use the first one's order of rows, so that they form one
    population.

    Attributes:
      task: a recipe's name.
      arm: the method.
      base: the configuration that the runs share, at the recipe's own learning rate.
      rates: learning rates to choose from; a single one is taken without a choice.
      seeds: of the reported runs.
      held_back: training rows on which the rate is chosen.
      folder: where the row's runs go.
      starts_from: the row whose best adapter this one starts from, by seed.
    """

    task: str
    arm: Arm
    base: RunConfig
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    held_back: int
    folder: Path
    starts_from: Row | None = None

    def choices(self) -> dict[float, RunConfig]:
        """A run for each learning rate, at the first seed, evaluated on held-back rows; none for a single rate."""
        if len(self.rates) == 1:
            return {}
        return {rate: self._run(rate, self.seeds[0], f"rate-{rate:g}", self.held_back) for rate in self.rates}

    def reported(self, rate: float) -> list[RunConfig]:
        """A run for each seed, trained on all rows and evaluated on the held-out ones."""
        return [self._run(rate, seed, f"seed-{seed}", None) for seed in self.seeds]

    def check(self) -> None:
        """Raises ValueError if the settings of one of its runs do not fit together."""
        self.choices()
        self.reported(self.rates[0])

    def _run(self, rate: float, seed: int, name: str, held_back: int | None) -> RunConfig:
        optim = self.base.optim
        # The heads' rate keeps its ratio to the adapters', which the recipe sets.
        heads = optim.head_learning_rate and optim.head_learning_rate * rate / optim.learning_rate
        start = self.starts_from and str(self.starts_from.folder / f"seed-{seed}" / "adapter")
        config = self.arm.configured(
            self.base,
            optim__learning_rate=rate,
            optim__head_learning_rate=heads,
            train__seed=seed,
            train__data_seed=self.seeds[0],
            data__held_back=held_back,
            output__folder=str(self.folder / name),
        )
        train = dataclasses.replace(config.train, warm_start=start or config.train.warm_start)
        return dataclasses.replace(config, train=train)


def plan_table(
    *,
    model: str | None,
    tasks: Sequence[str],
    methods: Sequence[str],
    folder: Path,
    data: Path | None,
    rates: Sequence[float],
    seeds: Sequence[int],
    held_back: int,
    warm_start: bool,
    overrides: Sequence[str],
) -> list[Row]:
    """The rows of a table, in the order of running.

    Args:
      model: a folder or hub id; None leaves the recipes' own.
      tasks: names of GLUE recipes, or "all".
      methods: arms by their words.
      folder: where results go, one folder for each task.
      data: a folder of TASK/train.* and TASK/validation.* with GLUE's columns; None reads the hub.
      rates: learning rates to choose from; empty takes the recipes' own.
      seeds: seeds of the reported runs.
      held_back: training rows to choose on.
      warm_start: start MRPC, RTE and STS-B from the same arm's MNLI adapter.
      overrides: `--section.key value` words for every recipe.

    Raises:
      ValueError: an unknown task or method, no run at all, missing files, or settings that do not fit together.
    """
    arms = arms_from_words(methods)
    if not seeds or len(set(seeds)) < len(seeds) or len(set(rates)) < len(rates):
        raise ValueError(f"seeds={list(seeds)} and rates={list(rates)} must be different numbers, at least one seed")
    rows: dict[tuple[str, str], Row] = {}
    for task in _ordered(tasks, warm_start):
        config = _configured(task, model, data, overrides)
        for arm in arms:
            rows[task, arm.word] = Row(
                task=task,
                arm=arm,
                base=arm.configured(config),
                rates=tuple(rates) or (arm.settings.get("optim.learning_rate", config.optim.learning_rate),),
                seeds=tuple(seeds),
                held_back=held_back,
                folder=folder / task / arm.folder,
                starts_from=rows["mnli", arm.word] if warm_start and task in WARM_STARTED else None,
            )
    for row in rows.values():
        row.check()
    return list(rows.values())


def _ordered(tasks: Sequence[str], warm_start: bool) -> list[str]:
    names = [*TASKS] if list(tasks) == ["all"] else list(dict.fromkeys(tasks))
    known = [path.stem for path in RECIPES.glob("*.toml") if path.stem.partition("-")[0] in GLUE]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown task {name!r}; choose all, or some of {', '.join(sorted(known))}")
    if not names:
        raise ValueError(f"there is no task to run; choose all, or some of {', '.join(sorted(known))}")
    if warm_start and "mnli" not in names and set(names) & set(WARM_STARTED):
        raise ValueError("--warm-start begins with MNLI's adapter; add mnli to --tasks")
    return sorted(names, key=lambda name: name != "mnli") if warm_start else names


def _configured(task: str, model: str | None, data: Path | None, overrides: Sequence[str]) -> RunConfig:
    words = [*overrides]
    if model:
        words += ["--model.name", model]
    if data:
        files = _files(data / task.partition("-")[0])
        words += [word for key, path in files.items() for word in (f"--data.{key}", str(path))]
    try:
        return from_toml(RECIPES / f"{task}.toml", words)
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from None


def _files(folder: Path) -> Mapping[str, Path]:
    found = {}
    for split in ("train", "validation"):
        there = [path for suffix in READERS if (path := folder / f"{split}{suffix}").is_file()]
        if len(there) != 1:
            listed = ", ".join(path.name for path in there) or "nothing"
            raise ValueError(
                f"{folder} must hold one {split} file ({', '.join(READERS)}), and holds {listed}; give --data such a "
                "folder for each task, or leave --data out to read the hub"
            )
        found[split] = there[0]
    return found
