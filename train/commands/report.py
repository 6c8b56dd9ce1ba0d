"""`python -m train report FOLDER`: a run's report again, from its folder's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from train.report.report import write_report


def report(words: Sequence[str]) -> int:
    """Writes the page and prints its path; returns the exit code."""
    if len(words) != 1:
        raise ValueError("which run? e.g. python -m train report runs/local")
    print(write_report(Path(words[0])))
    return 0
