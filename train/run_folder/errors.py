"""The error of what goes wrong in mid-run. Bad input is a `ValueError`, found before a run begins."""

from __future__ import annotations


class RunError(Exception):
    """A run could not continue; the message says what happened, where, and the remedy."""


class HostLostError(RunError):
    """Another process of the run is gone, so that this one can't continue.

    Args:
      error: what jax raised.
      kept: which checkpoint is left.
      command: what continues the run.
    """

    def __init__(self, error: Exception, kept: str, command: str) -> None:
        reason = " ".join(str(error).split())[:200]
        super().__init__(
            f"another host of the run was lost ({reason}); {kept}; continue, on every host, with: {command}"
        )
