"""The studies of n and r: which rows of a table belong on one curve, and what the curve says.

The paper asks how the score moves with the number of minis n and with their rank r. Both move something else along: at
equal r the parameters stay and the rank n·r grows; at equal rank the parameters shrink. So there is one study for each
question, and each curve holds rows that differ in nothing but the two numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

from train.lab.tables.results import Result

_OF_BLOCKS = ("lora", "melora")  # LoRA is MELoRA with n = 1
_VARIED = ("adapter.method", "adapter.n", "adapter.r")


@dataclasses.dataclass(frozen=True)
class Study:
    """One question: which rows, over what, and what they have in common along a curve.

    Attributes:
      name: of its figure.
      title: the question.
      symbol, x: the horizontal axis.
      together, same: what rows of one curve share, and that in words.
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
    """Rows of one task along a study's axis, in its order."""

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
    """The curves that a study finds among the results: two points at least, and nothing varied but n and r."""
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
