"""The error of what goes wrong in mid-run. Bad input is a `ValueError` and is found before."""

from __future__ import annotations

from pathlib import Path

from train.run_folder.folder import resume_command


class RunError(Exception):
    """Something happened while a run was under way; the message says what, where and the remedy."""


class HostLostError(RunError):
    """Another process of the run is gone, so that this one can't go on."""

    def __init__(self, error: Exception, kept: str, folder: Path) -> None:
        reason = " ".join(str(error).split())[:200]
        command = resume_command(folder)
        super().__init__(
            f"another host of the run was lost ({reason}); {kept}; continue, on every host, with: {command}"
        )
