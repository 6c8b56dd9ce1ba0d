"""Programs in the sandbox: what they may do, and that all else ends them without a trace."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.harness.sandbox import sandbox
from train.harness.sandbox.code import program_of
from train.harness.sandbox.sandbox import Limits, Outcome, require_sandbox, run_program

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the sandbox is x86-64 Linux's"
)
STOPPED = "stopped: it tried to use files, the network or another process"
QUICK = Limits(seconds=1, wait=20.0)


def test_a_program_that_ends_has_passed_and_nothing_else_has():
    program = "import collections, datetime, hashlib, heapq, itertools, math, random, re, string\nassert math.pi > 3"
    assert run_program(program) == Outcome(True, "")
    assert run_program("assert 1 > 2") == Outcome(False, "AssertionError")
    assert run_program("def f(:") == Outcome(False, "SyntaxError")
    assert run_program("def f():\n    return f()\nf()") == Outcome(False, "RecursionError")
    assert run_program("x = '\ud800'").passed is False


@pytest.mark.parametrize(
    "leaving", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit(0)"]
)
def test_a_program_that_leaves_before_its_end_has_not_passed(leaving):
    assert not run_program(f"{leaving}\nassert False").passed


def test_what_it_prints_and_reads_is_nothing():
    assert run_program(
        "print('x' * 10**6)\nimport sys\nassert sys.stdin.read() == ''\nprint('y', file=sys.stderr)"
    ).passed


@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "import os; os.open({path!r}, os.O_RDWR)",
        "open('here', 'w')",
        "import os; os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "import os; os.remove({path!r})",
        "import os; os.remove('program.py')",
        "import os; os.rename({path!r}, {path!r} + 'x')",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.utime({path!r})",
        "import os; os.mkdir('here')",
        "import os; os.symlink('a', 'b')",
        "import ctypes; ctypes.CDLL(None).truncate({path!r}.encode(), 0)",
    ],
)
def test_files_can_not_be_changed(program, tmp_path):
    """Even where the error would be caught: the process is over."""
    path = tmp_path / "kept"
    path.write_text("kept")
    before = path.stat()
    caught = f"try:\n    {program.format(path=str(path))}\nexcept Exception:\n    pass"
    assert run_program(caught) == Outcome(False, STOPPED)
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert (path.read_text(), path.stat().st_mode, path.stat().st_mtime_ns) == (
        "kept",
        before.st_mode,
        before.st_mtime_ns,
    )


@pytest.mark.skipif(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) < 1, reason="there is no Landlock")
def test_files_of_others_can_not_be_read(tmp_path):
    path = tmp_path / "secret"
    path.write_text("secret")
    assert run_program(f"open({str(path)!r}).read()") == Outcome(False, "PermissionError")
    assert run_program(f"import os; os.listdir({str(tmp_path)!r})") == Outcome(False, "PermissionError")
    assert (
        run_program("import os; assert os.listdir() == ['program.py'] and set(os.environ) <= {'LC_CTYPE'}").passed
        is True
    )


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
        "import os\nwhile True:\n    os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing; multiprocessing.Pool(2)",
        "import ctypes; ctypes.CDLL(None).fork()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import ctypes; ctypes.CDLL(None).ptrace(16, {pid}, 0, 0)",
    ],
)
def test_no_network_no_other_process_no_signal(program):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        port = server.getsockname()[1]
        caught = program.format(port=port, pid=os.getpid()).replace("\n", "\n    ")
        assert run_program(f"try:\n    {caught}\nexcept Exception:\n    pass", QUICK) == Outcome(False, STOPPED)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_time_and_memory_are_limited():
    began = time.monotonic()
    assert "processor time" in run_program("while True: pass", QUICK).reason
    assert "processor time" in run_program("while True:\n    try:\n        x\n    except:\n        pass", QUICK).reason
    assert "still there" in run_program("import time; time.sleep(99)", Limits(wait=1.5)).reason
    assert time.monotonic() - began < 60
    assert run_program("x = bytearray(2**31)") == Outcome(False, "MemoryError")
    assert run_program("x = bytearray(2**29)").passed


def test_limits_can_not_be_raised():
    program = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))"
    assert run_program(program) == Outcome(False, "ValueError")


def test_no_process_is_left(monkeypatch):
    """The one that waits is killed, and nothing it could have started is there."""
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(sandbox.subprocess, "Popen", Noted)
    run_program("import time; time.sleep(99)", Limits(wait=0.5))
    [process] = started
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_where_programs_can_not_be_held_none_is_run(monkeypatch):
    require_sandbox()
    monkeypatch.setattr(sandbox, "run_program", lambda program: Outcome(True, ""))
    with pytest.raises(ValueError, match="does not hold generated code"):
        require_sandbox()
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    with pytest.raises(ValueError, match="only x86-64 Linux has, not Darwin"):
        require_sandbox()


def test_the_jail_runs_nothing_once_the_kernel_has_refused(tmp_path, monkeypatch):
    """The filter is set, or the process is over: a jail whose filter is no filter comes to no verdict."""
    source = sandbox._JAIL.read_text(encoding="utf-8")
    broken = tmp_path / "jail.py"
    broken.write_text(source.replace("libc.prctl(22, 2,", "libc.prctl(22, 3,"), encoding="utf-8")
    monkeypatch.setattr(sandbox, "_JAIL", broken)
    assert run_program("pass") == Outcome(False, "the kernel refused the sandbox")


@pytest.mark.slow
def test_every_reference_solution_of_human_eval_passes_and_no_empty_one(human_eval_file: Path):
    problems = [json.loads(line) for line in human_eval_file.read_text(encoding="utf-8").splitlines()]
    assert len(problems) == 164
    outcomes = {one["task_id"]: run_program(program_of(one, one["canonical_solution"])) for one in problems}
    assert {task: outcome.reason for task, outcome in outcomes.items() if not outcome.passed} == {}
    assert not any(run_program(program_of(one, "    pass\n")).passed for one in problems[::20])


def test_the_jail_needs_nothing_installed():
    """It runs on the bare interpreter."""
    imports = [line for line in sandbox._JAIL.read_text(encoding="utf-8").splitlines() if line.startswith("import ")]
    assert {line.split()[1] for line in imports} <= set(sys.stdlib_module_names)
