"""One process's share of a run's rows, and what every process must know of the others'.

Each process reads and tokenises one part of the rows, and holds these alone. What the plan of batches needs of all
rows, their lengths and labels, is exchanged once, so that the plan is the same everywhere and on one process. A batch
is drawn from all rows, whoever holds them; `train.feed` puts it together on the devices, an exchange of a few token ids
beside the gradients'. So no row is read twice, and no file of tokens has to be shared and kept up to date.

Lists of rows are as long as the whole in every process, with None for what others hold.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def placed(values: Sequence[T], places: Sequence[int], size: int) -> list[T | None]:
    """A list of `size` with `values` at `places`, and None elsewhere.

    >>> placed("ab", [2, 0], 4)
    ['b', None, 'a', None]
    """
    rows: list[T | None] = [None] * size
    for place, value in zip(places, values, strict=True):
        rows[place] = value
    return rows


def _alone(text: str) -> list[str]:
    return [text]


@dataclasses.dataclass(frozen=True)
class Share:
    """Part `number` of `of`. Every process must call the methods that exchange in the same order.

    Attributes:
      exchange: one text of each process to those of all, in their order.
    """

    number: int = 0
    of: int = 1
    exchange: Callable[[str], list[str]] = _alone

    def cut(self, size: int) -> range:
        """The places, of `size`, that are in this part; the parts differ by one place at most.

        >>> Share(0, 3).cut(7), Share(1, 3).cut(7), Share(2, 3).cut(7)
        (range(0, 2), range(2, 4), range(4, 7))
        """
        return range(size * self.number // self.of, size * (self.number + 1) // self.of)

    def gather(self, make: Callable[[], T]) -> list[T]:
        """What `make()` gives in each process, as JSON keeps it.

        Raises:
          ValueError: in every process, if `make` fails in one.
        """
        if self.of == 1:
            return [make()]
        failure: ValueError | OSError | None = None
        try:
            said = {"value": make()}
        except (ValueError, OSError) as error:
            failure, said = error, {"error": str(error)}
        everyone = [json.loads(text) for text in self.exchange(json.dumps(said))]
        if failure is not None:
            raise failure
        for number, other in enumerate(everyone):
            if "error" in other:
                raise ValueError(f"process {number}: {other['error']}")
        return [other["value"] for other in everyone]

    def together(self, make: Callable[[], T]) -> T:
        """What `make()` gives here, once it succeeded in every process.

        Raises:
          ValueError: in every process, if `make` fails in one.
        """
        made: list[T] = []
        self.gather(lambda: made.append(make()))
        return made[0]

    def agree(self, what: str, make: Callable[[], Any]) -> None:
        """Raises ValueError, in every process, unless `make()` gives the same in all; `what` is its name."""
        if self.of == 1:
            return
        first, *others = self.gather(make)
        for number, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(f"{what} of process {number} differs from that of process 0; give all hosts the same")

    def before(self, make: Callable[[], int]) -> int:
        """The sum of what `make()` gives in the processes before this one."""
        return sum(self.gather(make)[: self.number])

    def spread(self, own: Sequence[T]) -> list[T | None]:
        """The rows of all processes, one after another: this one's, and None for the others'.

        >>> Share().spread("ab")
        ['a', 'b']
        """
        counts = self.gather(lambda: len(own))
        before = sum(counts[: self.number])
        return placed(own, range(before, before + len(own)), sum(counts))

    def merge(self, rows: Sequence[T | None]) -> list[T]:
        """The same rows with what every process has of them, as JSON keeps it."""
        held = [place for place, row in enumerate(rows) if row is not None]
        merged: list[Any] = [*rows]
        parts: Any = self.gather(lambda: [held, [rows[place] for place in held]]) if self.of > 1 else ()
        for places, values in parts:
            for place, value in zip(places, values, strict=True):
                merged[place] = value
        return merged


ALONE = Share()
