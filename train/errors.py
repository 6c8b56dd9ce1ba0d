"""The error of what goes wrong in mid-run. Bad input is a `ValueError` and is found before."""

from __future__ import annotations


class RunError(Exception):
    """Something happened while a run was under way; the message says what, where and the remedy."""
