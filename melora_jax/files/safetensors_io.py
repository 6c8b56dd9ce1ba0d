"""Files on disk: JSON and safetensors."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from melora_jax.files.atomic import flush, sibling
from melora_jax.files.dtypes import SAFETENSORS_DTYPES


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8 JSON, names a key twice, or holds something else than an object.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text('{"r": 8}')
    ...     read_json(Path(folder, "config.json"))
    {'r': 8}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the folder's name")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except _TwiceError as error:
        raise ValueError(f"{path} names {error.args[0]!r} twice in one object; remove one of them") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno} column {error.colno}: {error.msg}; mend the JSON or fetch the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} where an object {{...}} is expected")
    return value


class _TwiceError(Exception):
    """A key that stands twice in one JSON object, of which JSON readers silently take the last."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return values


class TensorFile:
    """One safetensors file, read a tensor at a time.

    Args:
      path: the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or is not safetensors, a tensor is not in it, or has a type NumPy lacks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(Path(folder, "x.safetensors"), {"w": np.ones((2, 3), np.float32)}, {"format": "pt"})
    ...     with TensorFile(Path(folder, "x.safetensors")) as file:
    ...         print(file.keys(), file.shape("w"), file.read("w").sum(), file.metadata)
    ['w'] (2, 3) 6.0 {'format': 'pt'}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist; check the name, or fetch the checkpoint again")
        try:
            self._file: Any = safe_open(str(self.path), framework="numpy")
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is truncated or is not a safetensors file ({error}); fetch or save it again"
            ) from error

    def __enter__(self) -> TensorFile:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, traceback)

    @property
    def metadata(self) -> dict[str, str]:
        """The file's text metadata; empty where it has none."""
        return dict(self._file.metadata() or {})

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._file.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`, from the header alone."""
        return tuple(self._slice(key).get_shape())

    def read(self, key: str) -> np.ndarray:
        """Tensor `key` as an array of the stored shape and dtype (bfloat16 as `ml_dtypes.bfloat16`)."""
        self.dtype(key)
        return self._file.get_tensor(key)

    def read_part(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of tensor `key` that `index`, a slice an axis, cuts out; nothing else is read."""
        self.dtype(key)
        return self._slice(key)[index]

    def dtype(self, key: str) -> np.dtype:
        """The dtype of tensor `key`, from the header alone."""
        stored = self._slice(key).get_dtype()
        if stored not in SAFETENSORS_DTYPES:
            raise ValueError(f"tensor {key} in {self.path} is stored as {stored}; convert it to F32, F16 or BF16 first")
        return SAFETENSORS_DTYPES[stored]

    def _slice(self, key: str) -> Any:
        if key not in self._file.keys():
            near = difflib.get_close_matches(key, self.keys(), n=1)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise ValueError(f"tensor {key} is not in {self.path}{hint}")
        return self._file.get_slice(key)


def write_tensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all: a file already there stays until the new one is on disk.

    Args:
      path: the file to write.
      tensors: name to array, any shapes; memory layout does not matter.
      metadata: text that goes in the header, such as `{"format": "pt"}`.

    Raises:
      OSError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = sibling(path, "tmp")
    # safetensors writes the memory block as it lies, which for a transposed view is the wrong order
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        save_file(contiguous, str(temporary), metadata=dict(metadata))
        flush(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}; free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
