"""Ctrl-C is answered at once, whatever the process is doing, and remembered."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LONG_STEP = """
import time
from train.hosts.interrupt import Interrupt
with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.signal():
        time.sleep(0.01)
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_during_a_step_and_a_second_one_ends_it(number):
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_STEP], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(number)
    said = process.stderr.readline()
    assert time.monotonic() - begun < 2
    assert said == f"{number.name}: the run stops after this step and saves; a second one ends it at once\n"
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == -number
