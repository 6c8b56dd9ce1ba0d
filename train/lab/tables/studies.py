"""The studies of n and r: which rows of a table form one curve, and what the curve shows.

The paper asks how the score depends on the number of minis n and on their rank r. Each also changes something else: at
equal r, the parameters stay equal and the rank n·r grows with n; at equal rank, the parameters shrink. So each question
has its own study, and the rows of a curve differ only in these two numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

from train.lab.tables.results import Result

_OF_BLOCKS = ("lora", "melora")  # LoRA is MELoRA with n = 1
_VARIED = ("adapter.method", "adapter.n", "adapter.r")


@dataclasses.dataclass(frozen=True)
class Study:
    """One question: which rows it compares, over which quantity, and what the rows of a curve share.

    Attributes:
      name: of its figure.
      title: the question.
      symbol, x: the horizontal axis.
      together, same: what the rows of one curve share, as a value and in words.
    """

    name: str
    title: str
    symbol: str
    x: Callable[[Result], int]
    together: Callable[[Result], Hashable]
    same: Callable[[Result], str]


STUDIES = (
    Study(
        "n_at_equal_parameters",
        "Number of minis at equal parameters: the rank grows with n",
        "n",
        lambda row: row.n,
        lambda row: row.parameters,
        lambda row: f"r={row.r}, {row.parameters:,} parameters",
    ),
    Study(
        "n_at_equal_rank",
        "Number of minis at equal rank: the parameters shrink with n",
        "n",
        lambda row: row.n,
        lambda row: row.rank,
        lambda row: f"rank {row.rank}",
    ),
    Study(
        "r_at_equal_n",
        "Rank of a mini at equal n: parameters and rank grow with r",
        "r",
        lambda row: int(row.r),
        lambda row: row.n,
        lambda row: f"n={row.n}",
    ),
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Rows of one task, ordered along a study's axis."""

    task: str
    label: str
    rows: tuple[Result, ...]

    def finding(self, study: Study) -> str:
        """How the score at the far end compares with that at the near end, seed by seed."""
        first, last = self.rows[0], self.rows[-1]
        change = last.against(first)
        words = {
            "wins": "better",
            "loses": "worse",
            "ties": "no difference beyond the interval",
            "one seed": "one seed",
        }
        ends = f"from {study.symbol}={study.x(first)} to {study.symbol}={study.x(last)}"
        return f"{self.task}, {self.label}: {ends} {first.metric} changes by {change.interval}: {words[change.verdict]}"


def curves(study: Study, results: Sequence[Result]) -> list[Curve]:
    """A study's curves among the results: each has at least two points, and its rows differ only in n and r."""
    groups: dict[tuple[Hashable, ...], list[Result]] = {}
    for row in results:
        if row.settings["adapter.method"] in _OF_BLOCKS and row.r.isdigit():
            rest = tuple(sorted((key, str(value)) for key, value in row.settings.items() if key not in _VARIED))
            groups.setdefault((row.task, study.together(row), rest), []).append(row)
    found = []
    for (task, *_), rows in groups.items():
        if len({study.x(row) for row in rows}) > 1:
            rows = sorted(rows, key=study.x)
            found.append(Curve(str(task), study.same(rows[0]), tuple(rows)))
    return found
