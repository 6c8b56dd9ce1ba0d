"""The accelerators that a run can be planned for, and how what it holds is divided over a mesh of them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from typing import Any

GIB = 2**30
# Memory of one device in GiB, as the makers and cloud providers state it.
_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "a100": 80, "h100": 80, "h200": 141, "b200": 180}
# What XLA's runtime and fragmentation leave to a program.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Devices:
    """So many devices of a kind, each with `memory` bytes."""

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


@dataclasses.dataclass(frozen=True)
class Shares:
    """A mesh, and the rules by which it divides arrays.

    Rows of a batch are divided over data and fsdp. Kernels and embeddings are divided over fsdp and tensor; vectors are
    on every device; an adapter's factors are divided over tensor where it divides n. The width of a feed-forward half,
    the heads and the vocabulary are divided over tensor where it divides them, the residual stream is not.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return self.data * self.fsdp * self.tensor

    def of_base(self, shape: tuple[int, ...]) -> int:
        """Into how many parts a base parameter is cut."""
        return self.fsdp * self.tensor if len(shape) > 1 else 1

    def of_factor(self, shape: tuple[int, ...]) -> int:
        """Into how many parts a factor [n i r] or [n r o] is cut."""
        return self.tensor if shape[0] % self.tensor == 0 else 1

    def of_activation(self, shape: tuple[int, ...], widths: frozenset[int]) -> int:
        """Into how many parts an array is cut one of whose axes, the first apart, may be among `widths`."""
        cut = any(size in widths and size % self.tensor == 0 for size in shape[1:])
        return self.tensor if cut else 1


def wide_axes(config: Any) -> frozenset[int]:
    """The sizes in a model's config.json whose axes the tensor axis divides."""
    keys = ("intermediate_size", "hidden_dim", "vocab_size", "num_attention_heads", "num_key_value_heads", "n_heads")
    return frozenset(config[key] for key in keys if isinstance(config.get(key), int))


def rows_a_device(batch_size: int, accumulate: int, shares: Shares) -> int:
    """Rows that one device holds at once.

    Raises:
      ValueError: they do not come out even.
    """
    parts = accumulate * shares.data * shares.fsdp
    if batch_size % parts:
        fits = math.ceil(batch_size / parts) * parts
        raise ValueError(
            f"train.batch_size={batch_size} does not divide into {accumulate} parts (train.accumulate) on "
            f"{shares.data} x {shares.fsdp} devices (data x fsdp); take {fits}, or fewer devices on these axes"
        )
    return batch_size // parts
