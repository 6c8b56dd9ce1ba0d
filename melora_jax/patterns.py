"""Which module a path pattern of a config means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` names the module at `path`: equal, a suffix of whole names, or a regular expression.

    >>> matches("self.query", "layer/0/self/query"), matches(r".*/[02]/.*", "layer/0/self/query")
    (True, True)
    >>> matches("ery", "query")
    False
    """
    return is_suffix(pattern, path) or any(
        re.fullmatch(pattern, spelled) is not None for spelled in (path, path.replace("/", "."))
    )


def is_suffix(name: str, path: str) -> bool:
    """Whether `name`, written with "." or "/", is `path` or its last whole names."""
    return ("/" + path).endswith("/" + name.replace(".", "/"))


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches `path`, else `default`."""
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)
