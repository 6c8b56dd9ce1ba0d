"""Programs that a model wrote, each run by `jail.py` in its own process, with limits on time and memory."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_JAIL = Path(__file__).with_name("jail.py")
_NOT_HELD = 3
_LONGEST_VERDICT = 200


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      seconds: of processor time.
      wait: seconds on the clock, for a program that sleeps, or on a busy machine.
      memory: bytes of address space.
    """

    seconds: int = 5
    wait: float = 30.0
    memory: int = 2**30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end without an error, and if not, why."""

    passed: bool
    reason: str


def require_sandbox() -> None:
    """Raises ValueError if programs can't be contained: not x86-64 Linux, or its kernel has no seccomp.

    It runs an empty program, which must pass, and one that opens a socket, which must be stopped.
    """
    system = f"{platform.system()} on {platform.machine()}"
    remedy = "leave out the tasks that run generated code, or run them on x86-64 Linux"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ValueError(f"generated code is run in a sandbox that only x86-64 Linux has, not {system}; {remedy}")
    if not run_program("pass").passed or run_program("import socket; socket.socket()").passed:
        raise ValueError(f"this kernel does not hold generated code in a sandbox (seccomp is refused); {remedy}")


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Runs Python source, which passes if it ends without an error.

    It can't write, make or remove a file, read a file other than Python's own, open a socket, start a process or a
    thread, or send a signal: an attempt ends it. Its folder, environment and input are empty, and its output is lost.
    (If the kernel has no Landlock, it can read files, but can't write or send their content anywhere.)

    Raises:
      OSError: no process can be started.
    """
    limits = limits or Limits()
    word = secrets.token_hex(16)  # printed at the end, so that a program that exits early has not passed
    settings = json.dumps({"word": word, "seconds": limits.seconds, "memory": limits.memory})
    with tempfile.TemporaryDirectory(prefix="melora-sandbox-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8", errors="surrogatepass")
        # -I and -S: neither this environment's packages nor the user's
        command = [getattr(sys, "_base_executable", sys.executable), "-I", "-S", "-B", str(_JAIL), str(path)]
        with subprocess.Popen(
            command,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            return _outcome(process, settings, word, limits)


def _outcome(process: subprocess.Popen[bytes], settings: str, word: str, limits: Limits) -> Outcome:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(settings.encode() + b"\n")
        process.stdin.close()
        code = process.wait(limits.wait)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
        return Outcome(False, f"still there after {limits.wait:g} s")
    # read only now: a program that writes more than a pipe holds blocks, and is killed above
    said = os.read(process.stdout.fileno(), _LONGEST_VERDICT).decode("ascii", "replace")
    if code == 0 and said == word:
        return Outcome(True, "")
    return Outcome(False, _reason(code, said, limits))


def _reason(code: int, said: str, limits: Limits) -> str:
    if code == _NOT_HELD:
        return "the kernel refused the sandbox"
    if code == -signal.SIGSYS:
        return "stopped: it tried to use files, the network or another process"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"stopped: over {limits.seconds} s of processor time"
    return said if code == 1 and said else f"left before its end (status {code})"
