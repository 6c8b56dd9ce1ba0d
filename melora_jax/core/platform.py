"""The platform that programs are traced for: this process's default, or another that `compile_for` names."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("melora_platform", default=None)

# JAX caches the traces of inner functions (jit, remat, scan) by their arguments, and the platform is not one of them.
_trace_mark = jax.make_user_context(default_value=None)


def platform() -> str:
    """The platform that the program being traced is for, as JAX names it: "cpu", "gpu" or "tpu".

    >>> with compile_for("tpu"):
    ...     platform()
    'tpu'
    """
    return _asked.get() or jax.default_backend()


@contextlib.contextmanager
def compile_for(platform: str) -> Iterator[None]:
    """Traces programs for `platform`, whether or not this machine has such a device.

    What depends on the platform is chosen while JAX traces, so this applies to what is traced inside: enter it around
    `jit(...).lower(...)`, `jax.make_jaxpr(...)` or the first call. A function that is jitted inside and called again
    outside is traced again.

    Args:
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: the name is another.

    >>> import jax.numpy as jnp
    >>> with compile_for("gpu"):
    ...     program = jax.jit(jnp.sin).trace(jnp.ones(3)).lower(lowering_platforms=("cuda",))
    """
    if platform not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"platform {platform!r} is unknown; choose cpu, gpu or tpu")
    token = _asked.set(platform)
    try:
        with _trace_mark(platform):
            yield
    finally:
        _asked.reset(token)
