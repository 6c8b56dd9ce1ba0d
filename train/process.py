"""What a process of ours sets for itself: its memory, what the library logs, and where compiled programs are kept.

On CPU under glibc, memory that a step frees is kept for the next one. XLA asks for a step's temporary memory at every
step, and glibc returns so large a piece to the system when it is freed: each step then meets it page by page again. The
price is that the process stays as large as it once was, at most one step's temporary memory above its peak.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import platform
from pathlib import Path
from typing import TextIO

# The names and numbers of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def prepare_process(stream: TextIO) -> None:
    """To be called before jax is imported. What the library logs goes to `stream` as it is."""
    # transformers gives tokenizers here; that it misses torch for its models concerns nobody.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _show_library_log(stream)
    use_one_arena()
    _keep_compiled_programs()


def use_one_arena() -> None:
    """All threads take memory from one heap, since only that one can be kept. To be called before jax starts any.

    Nothing changes if the user chose settings of malloc, or has an accelerator's plugin installed: many threads that
    prepare data for it would wait for each other.
    """
    if _adjustable():
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Returns to the system what is free now, and nothing later. To be called when the steps are compiled."""
    if _adjustable():
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _show_library_log(stream: TextIO) -> None:
    logger = logging.getLogger("melora_jax")
    logger.handlers = [logging.StreamHandler(stream)]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _keep_compiled_programs() -> None:
    """XLA keeps what it compiles for the next run, unless the user chose a folder."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "melora_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _adjustable() -> bool:
    own = any(name in os.environ for name in _OWN_SETTINGS)
    accelerated = importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu")
    return platform.libc_ver()[0] == "glibc" and not own and not accelerated
