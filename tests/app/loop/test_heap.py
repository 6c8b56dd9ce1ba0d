"""A step's memory is kept for the next one, and left alone where the user has settings of their own."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings"),
]

# 160 MB of temporary memory: 39,000 pages of 4 kB.
STEPS = """
import resource, statistics, sys
from train.process import keep_freed_memory, use_one_arena
if "keep" in sys.argv: use_one_arena()
import jax, jax.numpy as jnp
step = jax.jit(lambda a, b, c: jnp.tanh(a @ b) @ c)
arrays = jnp.ones((40_000, 8)), jnp.ones((8, 1000)), jnp.ones((1000, 8))
compiled = step.lower(*arrays).compile()
if "keep" in sys.argv: keep_freed_memory()
faults = []
for _ in range(25):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(compiled(*arrays))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(faults[6:]))  # early, a step may begin before the last one's memory is free
"""


def faults(*words: str, **environment: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *words], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def test_a_later_step_meets_no_new_page() -> None:
    assert faults("keep") < 160e6 / resource.getpagesize() / 20


def test_the_users_own_settings_stand() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") == pytest.approx(faults(), rel=0.1)
