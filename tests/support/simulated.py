"""Settings of processes that simulate several devices on a CPU.

A sum over devices holds the thread that computes it until the others come to theirs. XLA starts one thread a device,
two sums of one device can hold two, and so all may wait for a device that finds none free. Now and then runs on two
busy cores did; eight threads a device leave room.
"""

from __future__ import annotations

import os

# Tests compare two compilations of the same sums; neither has to be fast.
FLAGS = "--xla_backend_optimization_level=0"


def environment(devices: int | None = None, **more: str) -> dict[str, str]:
    """This process's environment with what simulated devices need; `devices` where the program does not set them."""
    flags = FLAGS if devices is None else f"--xla_force_host_platform_device_count={devices} {FLAGS}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "64", **more}
