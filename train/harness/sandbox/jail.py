"""Runs one program with almost no rights, in its own process, started by `sandbox.py`, with nothing but Python.

The kernel enforces the limits, not Python. Seccomp allows the system calls that computing needs; any other one ends the
process. Landlock allows reading Python's own library, and no file can be written, made or removed. There is no network,
no further process or thread and no signal, and time and memory are limited. The numbers are those of x86-64 Linux.
"""

import ctypes
import json
import os
import resource
import runpy
import struct
import sys
from pathlib import Path

# The system calls that reading, computing and ending need, by the kernel's numbers.
_ALLOWED = """
mmap 9, mprotect 10, munmap 11, brk 12, mremap 25, madvise 28,
read 0, write 1, close 3, stat 4, fstat 5, lstat 6, poll 7, lseek 8, pread64 17, readv 19, writev 20, access 21,
select 23, dup 32, dup2 33, getdents 78, getcwd 79, readlink 89, getdents64 217, fadvise64 221, newfstatat 262,
readlinkat 267, faccessat 269, pselect6 270, ppoll 271, dup3 292, statx 332, faccessat2 439,
rt_sigaction 13, rt_sigprocmask 14, rt_sigreturn 15, sigaltstack 131, restart_syscall 219, futex 202,
sched_yield 24, sched_getaffinity 204, nanosleep 35, clock_nanosleep 230, gettimeofday 96, time 201, times 100,
clock_gettime 228, clock_getres 229, getrusage 98, sysinfo 99, uname 63, getrandom 318,
getpid 39, gettid 186, getppid 110, getuid 102, getgid 104, geteuid 107, getegid 108,
arch_prctl 158, set_tid_address 218, set_robust_list 273, rseq 334, membarrier 324, exit 60, exit_group 231
"""
# Harmless queries, refused with ENOTTY (is it a terminal?) and EPERM.
_REFUSED = {"ioctl": (16, 25), "fcntl": (72, 1), "getrlimit": (97, 1), "prlimit64": (302, 1)}
_OPENAT = 257
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and O_TMPFILE's own bit
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_X86_64 = 0xC000003E
_NUMBER_AT, _ARCHITECTURE_AT, _THIRD_ARGUMENT_AT = 0, 4, 32


def main() -> None:
    """Runs the program of the first argument; prints the word from standard input if the program ends normally."""
    settings = json.loads(sys.stdin.readline())
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    _limit(settings["seconds"], settings["memory"])
    libc = ctypes.CDLL(None, use_errno=True)
    _require(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _hide_files(libc)
    _hold(libc)
    try:
        runpy.run_path(sys.argv[1], run_name="__main__")
    except BaseException as error:
        os.write(verdict, type(error).__name__.encode("ascii", "replace")[:100])
        os._exit(1)
    os.write(verdict, settings["word"].encode())
    os._exit(0)


def _limit(seconds: int, memory: int) -> None:
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def _hide_files(libc: ctypes.CDLL) -> None:
    """Landlock (Linux 5.13 and later, if enabled): only Python, the system's libraries and this folder are readable."""
    version = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    rights = (1 << 13 if version < 2 else 1 << 14 if version < 3 else 1 << 15) - 1
    ruleset = _require(libc.syscall(444, struct.pack("Q", rights), ctypes.c_size_t(8), 0))
    read = 1 << 2 | 1 << 3
    own = {Path.cwd(), Path(sys.base_prefix), Path(os.__file__).parent}
    for path in own | {Path(name) for name in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")}:
        if path.is_dir():
            folder = os.open(path, os.O_PATH)
            _require(libc.syscall(445, ruleset, 1, struct.pack("=Qi", read, folder), 0))
            os.close(folder)
    _require(libc.syscall(446, ruleset, 0))
    os.close(ruleset)


def _hold(libc: ctypes.CDLL) -> None:
    """Seccomp: from here on a system call outside the lists ends the process."""
    rules = [(_LOAD, 0, 0, _ARCHITECTURE_AT), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, _KILL)]
    rules += [(_LOAD, 0, 0, _NUMBER_AT)]
    for number in (int(entry.split()[1]) for entry in _ALLOWED.split(",")):
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for number, error in _REFUSED.values():
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    rules += [(_EQUAL, 1, 0, _OPENAT), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _THIRD_ARGUMENT_AT)]
    rules += [(_ANY_BIT, 0, 1, _WRITING), (_RETURN, 0, 0, _KILL), (_RETURN, 0, 0, _ALLOW)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    head = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(program))
    _require(libc.prctl(22, 2, ctypes.c_char_p(head), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _require(result: int) -> int:
    if result < 0:
        os._exit(3)
    return result


if __name__ == "__main__":
    main()
