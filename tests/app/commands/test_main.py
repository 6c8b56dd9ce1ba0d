"""`python -m train`: the table of commands, and a help that comes at once."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.__main__ import COMMANDS, main, usage

ROOT = Path(__file__).resolve().parents[3]


def test_help_comes_at_once_and_without_jax():
    code = "import sys; from train.__main__ import main; main(['--help']); print('jax' in sys.modules)"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - begun < 2
    assert done.stdout == f"{usage()}\nFalse\n"


def test_help_names_every_command(capsys):
    assert main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(COMMANDS)]] == list(COMMANDS)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    module, function = COMMANDS[name][0].split(":")
    assert callable(getattr(importlib.import_module(module), function))
