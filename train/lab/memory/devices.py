"""The accelerators that a run can be planned for."""

from __future__ import annotations

import dataclasses
import math
import os
import re

from jax.sharding import AbstractMesh

GIB = 2**30
# Memory of one device in GiB, as the makers and cloud providers state it.
_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "a100": 80, "h100": 80, "h200": 141, "b200": 180}
# What XLA's runtime and fragmentation leave to a program.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Devices:
    """A number of devices of one kind, each with `memory` bytes."""

    kind: str
    count: int
    memory: int

    @property
    def usable(self) -> int:
        """Bytes of one device that a program can count on."""
        return int(USABLE * self.memory)


def devices_from_name(name: str) -> Devices:
    """The devices that a word such as v5e-8, h100x8, a100 or cpu names.

    Raises:
      ValueError: the kind is not known.

    >>> devices_from_name("v5e-8").count, devices_from_name("h100x2").memory // GIB
    (8, 80)
    """
    if name == "cpu":
        return Devices("cpu", 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    found = re.fullmatch(r"(\w+?)(?:[-x](\d+))?", name)
    if not found or found[1] not in _MEMORY or found[2] == "0":
        raise ValueError(f"device {name!r} is not known; give cpu, or one of {', '.join(_MEMORY)} with a count: v5e-8")
    return Devices(found[1], int(found[2] or 1), _MEMORY[found[1]] * GIB)


def rows_a_device(batch_size: int, accumulate: int, mesh: AbstractMesh) -> int:
    """Rows that one device holds at once.

    Raises:
      ValueError: the devices do not divide the rows evenly.
    """
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    parts = accumulate * data * fsdp
    if batch_size % parts:
        fits = math.ceil(batch_size / parts) * parts
        raise ValueError(
            f"train.batch_size={batch_size} does not divide into {accumulate} parts (train.accumulate) on {data} x "
            f"{fsdp} devices (data x fsdp); take {fits}, or fewer devices on these axes"
        )
    return batch_size // parts
