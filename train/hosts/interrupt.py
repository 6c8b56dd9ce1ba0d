"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Interrupt:
    """While entered, remembers the first SIGINT or SIGTERM and says so; a second one ends the process as usual."""

    def __init__(self) -> None:
        self._noted: int | None = None
        self._before: dict[int, Any] = {}

    def signal(self) -> int | None:
        """The signal that came, if one did."""
        return self._noted

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        self._restore()
        _say(f"{signal.Signals(number).name}: the run stops after this step and saves; a second one ends it at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class SharedInterrupt(Interrupt):
    """The same for many processes that ask equally often: all see a signal to any of them, one question later.

    The later question spares the devices a wait: each answer is on its way while the next step runs.
    """

    def __init__(self) -> None:
        super().__init__()
        mesh = Mesh(np.array(jax.devices()), ("devices",))
        self._one_a_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._answer: jax.Array | None = None

    def signal(self) -> int | None:
        """The signal that came to any process before the last question. Every process must ask equally often."""
        noted = np.full(jax.local_device_count(), self._noted or 0, np.int32)
        before, shape = self._answer, (jax.device_count(),)
        self._answer = self._largest(jax.make_array_from_process_local_data(self._one_a_device, noted, shape))
        return None if before is None else int(before) or None


def make_interrupt() -> Interrupt:
    """What fits the number of processes."""
    return Interrupt() if jax.process_count() == 1 else SharedInterrupt()


def _say(text: str) -> None:
    """One line on standard error, past Python's buffers: a handler may run while one of them is being written."""
    try:
        number = sys.__stderr__.fileno() if sys.__stderr__ else 2
        # On a terminal the cursor stands behind the progress line.
        os.write(number, f"{chr(10) if os.isatty(number) else ''}{text}\n".encode())
    except OSError:
        pass  # nobody looks on
