"""The results of a bench as a JSON file: a record for each subject, with a row for each step."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import jax

from train.lab.bench.flops import peak_flops
from train.lab.bench.steps import LIMIT, Bench, Facts
from train.run_folder.log import replace_text

PACKAGES = ("jax", "jaxlib", "flax", "torch", "peft")


@dataclasses.dataclass(frozen=True)
class Row:
    """One step's seconds in each round, and other facts about it."""

    name: str
    seconds: list[float]
    facts: dict[str, Any]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class Record:
    """The steps of one subject, which took turns; times are divided by those of the first."""

    subject: dict[str, Any]
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.subject["batch_size"] * self.subject["length"]

    def ratio(self, row: Row) -> float:
        """A step's time over the first step's in the same round, the median over rounds."""
        return statistics.median(mine / first for mine, first in zip(row.seconds, self.rows[0].seconds, strict=True))

    def flops_per_second(self, row: Row) -> float | None:
        """The model's FLOP/s, without the adapter's arithmetic."""
        flops = row.facts["flops"]
        return flops and flops / row.median

    def utilisation(self, row: Row, device: str) -> float | None:
        """The share of the device's peak (MFU)."""
        peak, rate = peak_flops(device, self.subject["dtype"]), self.flops_per_second(row)
        return rate / peak if peak and rate else None


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the bench.

    Attributes:
      title: the heading.
      machine: device, processor, system, versions and date.
      sweep: the quantities that vary between records.
      records: one for each subject.
      compiles: rows of the table of compilations.
    """

    title: str
    machine: dict[str, Any]
    sweep: list[str]
    records: list[Record]
    compiles: list[dict[str, Any]]


def row_of(name: str, seconds: list[float], facts: Facts, peak_bytes: int | None) -> Row:
    """The row of one step."""
    return Row(name, seconds, facts._asdict(), peak_bytes)


def record_of(bench: Bench, rows: list[Row]) -> Record:
    """The record of a subject; of a model's folder it keeps only the name."""
    return Record(dataclasses.asdict(bench) | {"model": Path(bench.model).name}, rows)


def machine() -> dict[str, Any]:
    """Where and when the bench ran."""
    device = jax.local_devices()[0]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.device_kind,
        "backend": device.platform,
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def save(run: Run, path: Path) -> None:
    """Writes a run, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(dataclasses.asdict(run), indent=1) + "\n")


def load(path: Path) -> Run:
    """The inverse of `save`.

    Raises:
      ValueError: the file is not a result of the bench.
    """
    try:
        values = json.loads(path.read_text())
        records = [
            Record(record["subject"], [Row(**row) for row in record["rows"]]) for record in values.pop("records")
        ]
        return Run(records=records, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a result of the bench ({error}); write it again with --out {path}") from None


def is_limit(row: Row) -> bool:
    """Whether a row is the frozen limit's."""
    return row.name == LIMIT
