"""What writes that were killed leave in a run's folder, beside the file or folder they were to replace."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

# `.NAME.<hexadecimal>.tmp`, not yet in NAME's place, or `.NAME.<hexadecimal>.old`, already taken out of it.
_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]+\.(?P<kind>tmp|old)")


def leftovers(folder: Path) -> list[Path]:
    """The temporary files and folders that lie in `folder`; no process must be writing there."""
    return sorted(entry for entry in folder.glob(".*") if _NAME.fullmatch(entry.name))


def clear_leftovers(folder: Path) -> None:
    """Removes them, except that an old content whose successor never came is put back into its place."""
    for entry in leftovers(folder):
        found = _NAME.fullmatch(entry.name)
        if found and found["kind"] == "old" and not (folder / found["name"]).exists():
            entry.rename(folder / found["name"])
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
