"""What `adapt` reports: the adapted layers and the numbers of parameters, as data and as a table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

from melora_jax.config import AdapterSpec, Strategy

# The values that vLLM's --max-lora-rank takes; 16 is its default.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted layer: its path, flat sizes, and the adapter's shape.

    Attributes:
      path: of the layer in its model.
      d_in, d_out: flat sizes of its kernel.
      n, r, scaling, mixer: of the adapter, as in `AdapterSpec`.
      rank: of the update, as plain LoRA factors hold it.
      parameters: that are trained here.
      strategy: how the product is computed, once "auto" is resolved.
    """

    path: str
    d_in: int
    d_out: int
    n: int
    r: tuple[int, ...]
    rank: int
    parameters: int
    scaling: str
    mixer: str
    strategy: str

    @classmethod
    def of(
        cls, path: str, spec: AdapterSpec, sizes: tuple[int, int], *, rank: int, parameters: int, strategy: Strategy
    ) -> Site:
        """The row of a layer of `sizes` (d_in, d_out) with an adapter of these settings."""
        return cls(path, *sizes, spec.n, spec.r, rank, parameters, spec.scaling, spec.mixer, strategy)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `adapt` did. Prints as a table.

    Attributes:
      sites: the adapted layers.
      adapter, head, frozen: numbers of parameters in the factors, in `modules_to_save`, and in the frozen base.
      saved: paths of the modules that are trained whole.
      base: number of the base's parameters that are trained: biases, or all.
      notes: which layers' factors are not cut over `tensor` on a mesh, and why.

    >>> site = Site("layers/0", 4, 6, 2, (1, 1), 2, 10, "mini", "identity", "packed")
    >>> print(Adaptation((site,), adapter=10, head=0, frozen=30, saved=()))
    site      d_in  d_out  n  r  rank  parameters  strategy
    layers/0     4      6  2  1     2          10  packed
    adapters 10 + head 0 = 10 trainable (25.00 %), 30 frozen
    """

    sites: tuple[Site, ...]
    adapter: int
    head: int
    frozen: int
    saved: tuple[str, ...]
    notes: tuple[str, ...] = ()
    base: int = 0

    @property
    def trainable(self) -> int:
        """How many parameters are trained: those of the factors, of the base, and of `modules_to_save`."""
        return self.adapter + self.base + self.head

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and numbers, for JSON."""
        return dataclasses.asdict(self) | {"trainable": self.trainable}

    def __str__(self) -> str:
        rows = [("site", "d_in", "d_out", "n", "r", "rank", "parameters", "strategy"), *_rows(self.sites)]
        share = 100 * self.trainable / max(1, self.trainable + self.frozen)
        saved = f"\ntrained whole: {', '.join(self.saved)}" if self.saved else ""
        base = f" + base {self.base:,}" if self.base else ""
        counts = f"\nadapters {self.adapter:,}{base} + head {self.head:,} = {self.trainable:,} trainable"
        notes = "".join(f"\n{note}" for note in self.notes)
        return f"{table(rows, left=(0, 7))}{saved}{counts} ({share:.2f} %), {self.frozen:,} frozen{notes}"


def table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of cells, the header first, as text in aligned columns with two spaces between.

    Args:
      rows: the cells, as many in each row.
      left: numbers of the columns that are aligned left, as names are; the others are aligned right.

    >>> print(table([("site", "rank"), ("layers/0", "8")]))
    site      rank
    layers/0     8
    """
    columns = []
    for number, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if number in left else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def served_rank(rank: int) -> int | None:
    """The --max-lora-rank that vLLM must be given for an adapter of `rank`; None above its limit.

    >>> served_rank(9), served_rank(513)
    (16, None)
    """
    return next((served for served in SERVED_RANKS if served >= rank), None)


def rank_note(rank: int) -> str:
    """What vLLM's limit of ranks means for a plain export of `rank`.

    >>> rank_note(64)
    'vLLM serves it with --max-lora-rank 64'
    """
    served = served_rank(rank)
    if served is None:
        return f"above vLLM's limit of {SERVED_RANKS[-1]}; merge the model to serve it there"
    return f"vLLM serves it with --max-lora-rank {served}"


def _rows(sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """One row for all sites that differ in nothing but the number of their layer."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in sites:
        path, *cells = _row(site)
        numbered = re.search(r"(?:^|/)(\d+)(?:/|$)", path)
        start, end = numbered.span(1) if numbered else (len(path), len(path))
        groups.setdefault((path[:start], path[end:], *cells), []).append(path[start:end])
    rows = []
    for (before, after, *cells, parameters, strategy), numbers in groups.items():
        times = f"{len(numbers)} × " if len(numbers) > 1 else ""
        rows.append((f"{before}{_listed(numbers)}{after}", *cells, f"{times}{parameters}", strategy))
    return rows


def _listed(numbers: Sequence[str]) -> str:
    """Layer numbers as "0-5" where none is left out, else as "0,2,5"."""
    if len(numbers) > 2 and [int(number) - int(numbers[0]) for number in numbers] == list(range(len(numbers))):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(numbers)


def _row(site: Site) -> tuple[str, ...]:
    r = str(site.r[0]) if len(set(site.r)) == 1 else ",".join(map(str, site.r))
    sizes = (str(size) for size in (site.d_in, site.d_out, site.n, r, site.rank))
    return (site.path, *sizes, f"{site.parameters:,}", site.strategy)
