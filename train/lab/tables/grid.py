"""A grid of runs over one recipe: which keys take which values, and the configuration of each point."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from train.config.recipe import check_options
from train.config.run_config import RunConfig, from_toml, to_toml

_NOT_IN_NAMES = re.compile(r"[^\w.+-]+")
_NOT_VARIED = {
    "output.folder": "each run gets a folder of its own below it",
    "train.metric": "runs ranked by different metrics can't be compared",
    "train.tensorboard": "it changes no result",
    "train.log_every": "it changes no result",
}
_NOT_VARIED_SECTIONS = {"mesh": "it changes no result", "distributed": "it changes no result"}


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a grid: its varied keys with their values as they were written, and its configuration."""

    values: tuple[tuple[str, str], ...]
    config: RunConfig

    @property
    def name(self) -> str:
        """The values as a folder's name."""
        return _name(self.values)


def parse_grid(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Words such as `optim.learning_rate=1e-3,2e-3` as key → values.

    Raises:
      ValueError: a word is not KEY=VALUE,VALUE; a key is unknown, repeated or can't vary; a value is empty or repeated.

    >>> parse_grid(["adapter.n=1,4"])
    {'adapter.n': ('1', '4')}
    """
    grid: dict[str, tuple[str, ...]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key, values = key.replace("-", "_"), tuple(value.strip() for value in text.split(","))
        if not equals or not all(values):
            raise ValueError(f"--grid {word!r} must be KEY=VALUE,VALUE with no value empty, e.g. adapter.n=1,4,8")
        _check_key(key)
        if key in grid:
            raise ValueError(f"--grid names {key} twice; give all its values once, {key}=VALUE,VALUE")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise ValueError(f"--grid gives {key} the value {twice[0]} twice; give it once")
        grid[key] = values
    return grid


def _check_key(key: str) -> None:
    try:
        check_options([f"--{key}"])
    except ValueError as error:
        raise ValueError(f"--grid: {str(error).replace('option --', 'key ')}") from None
    reason = _NOT_VARIED.get(key) or _NOT_VARIED_SECTIONS.get(key.partition(".")[0])
    if reason:
        raise ValueError(f"--grid can't vary {key}: {reason}; leave it out")


def points_of(
    recipe: str | Path, overrides: Sequence[str], grid: dict[str, tuple[str, ...]], seeds: int, own_order: bool
) -> list[Point]:
    """The runs of a grid, each `seeds` times: seeds count up from the recipe's `train.seed`.

    Args:
      recipe, overrides: as for `from_toml`.
      grid: from `parse_grid`.
      seeds: runs at each point.
      own_order: each seed has its own order of rows; else all use that of the first seed.

    Raises:
      ValueError: as for `from_toml`; nothing to vary; two runs that are the same.
    """
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} makes a grid of zero runs; give at least 1")
    if seeds > 1 and "train.seed" in grid:
        raise ValueError("--seeds and --grid train.seed=... both vary train.seed; give one of them")
    base = from_toml(recipe, overrides)
    if seeds > 1:
        grid = grid | {"train.seed": tuple(str(base.train.seed + number) for number in range(seeds))}
    if not grid:
        raise ValueError("nothing to vary; give --seeds 8, or --grid KEY=VALUE,VALUE")
    order = [] if own_order or base.train.data_seed is not None else ["--train.data_seed", _first_seed(base, grid)]
    points = []
    for chosen in itertools.product(*grid.values()):
        values = tuple(zip(grid, chosen, strict=True))
        folder = str(Path(base.output.folder) / _name(values))
        words = [word for key, value in values for word in (f"--{key}", *value.split())]
        points.append(Point(values, from_toml(recipe, [*overrides, *order, *words, "--output.folder", folder])))
    _require_different(points)
    return points


def _first_seed(base: RunConfig, grid: dict[str, tuple[str, ...]]) -> str:
    return grid["train.seed"][0] if "train.seed" in grid else str(base.train.seed)


def _name(values: Sequence[tuple[str, str]]) -> str:
    return ",".join(f"{key.rpartition('.')[2]}={_NOT_IN_NAMES.sub('_', value)}" for key, value in values)


def _require_different(points: Sequence[Point]) -> None:
    """Refuses two spellings of one value, and two runs with one folder name."""
    settings: dict[str, Point] = {}
    folders: dict[str, Point] = {}
    for point in points:
        bare = dataclasses.replace(point.config, output=points[0].config.output)
        same = settings.setdefault(to_toml(bare), point)
        if same is not point:
            raise ValueError(f"--grid makes the same run twice, as {same.name} and as {point.name}; give it once")
        if folders.setdefault(point.config.output.folder, point) is not point:
            raise ValueError(f"--grid makes two runs named {point.name}; vary keys whose last words differ")
