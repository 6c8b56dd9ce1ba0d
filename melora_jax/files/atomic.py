"""Writes that happen whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def sibling(path: Path, suffix: str) -> Path:
    """A new hidden name beside `path`, on the same disk."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{suffix}")


def flush(file: Path) -> None:
    """Waits until a file's content is on disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Writes a folder whole or not at all: yields a temporary folder beside it that takes its place on success.

    On any error the old folder stays as it was. Files of the old folder that the new one does not write are never
    deleted: the replacement is refused instead. (Two renames: a machine that dies between them leaves the old
    content beside, in `.<name>.<digits>.old`.)

    Args:
      folder: the folder to write, existing or not.

    Raises:
      ValueError: `folder` is a file, a mount point, or the working directory, or holds files that the new
        content does not replace.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as parent:
    ...     with atomic_folder(Path(parent, "adapter")) as temporary:
    ...         _ = (temporary / "config.json").write_text("{}")
    ...     [file.name for file in Path(parent, "adapter").iterdir()]
    ['config.json']
    """
    target = Path(folder).expanduser().resolve()
    _require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(target, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        _require_no_strangers(target, temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                flush(file)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _require_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file where a folder is to be written; choose another name")
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point, which cannot be replaced as a whole; choose a folder inside it")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise ValueError(f"{target} holds the working directory and cannot be replaced; choose a folder inside it")


def _require_no_strangers(target: Path, temporary: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()}

    strangers = sorted(files(target) - files(temporary)) if target.is_dir() else []
    if strangers:
        named = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        raise ValueError(f"{target} holds files that would be lost ({named}); choose an empty folder or move them away")


def _swap(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    previous = sibling(target, "old")
    os.rename(target, previous)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(previous, target)
        raise
    shutil.rmtree(previous)
