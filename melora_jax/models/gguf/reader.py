"""The bytes of a GGUF file: a header in which every length is checked, and tensors dequantised one at a time.

The gguf package knows how tensors are packed and unpacks them. The header is read here, because that package's reader
trusts every count in a file: a false one makes it allocate until memory runs out, and a vocabulary of 100,000 tokens
takes it seconds.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_LENGTH = struct.Struct("<Q")
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Where a tensor lies in the file, and how it is packed.

    Attributes:
      shape: its shape, in NumPy's order.
      type: the number of its ggml type.
      start: its first byte in the file.
      row_bytes: bytes of one row, of `shape[-1]` elements.
    """

    shape: tuple[int, ...]
    type: int
    start: int
    row_bytes: int


class GGUFFile:
    """One GGUF file: its fields, and its tensors read one at a time as float32.

    Args:
      path: the file.

    Attributes:
      path: the file.
      fields: the values of the header by key: numbers (a float32 as the shortest decimal that rounds to it),
        booleans, strings and lists of these.
      tensors: where each tensor lies, by the name it has in the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a GGUF file of version 2 or 3, is damaged, is one part of several, or is packed in a way
        that the gguf package can't unpack; or that package is missing.

    >>> import gguf, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = gguf.GGUFWriter(f"{folder}/tiny.gguf", "llama")
    ...     writer.add_tensor("output_norm.weight", np.ones(3, np.float32))
    ...     writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
    ...     writer.close()
    ...     file = GGUFFile(f"{folder}/tiny.gguf")
    ...     file.fields["general.architecture"], file.read("output_norm.weight")
    ('llama', array([1., 1., 1.], dtype=float32))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist; check the name, or fetch the file again")
        if self.path.stat().st_size == 0:
            raise ValueError(f"{self.path} is empty; fetch the file again")
        header = _Header(np.memmap(self.path, np.uint8, "r").data, self.path)
        header.require_readable()
        tensors, fields = header.number("Q"), header.number("Q")
        self.fields: dict[str, Any] = header.fields(fields)
        _require_whole(self.fields, self.path)
        self.tensors: dict[str, Packed] = header.tensors(tensors, self.fields.get("general.alignment", _ALIGNMENT))

    def read(self, name: str) -> np.ndarray:
        """Tensor `name`, dequantised to float32, as an array of its own."""
        packed = self.tensors[name]
        rows = (*packed.shape[:-1], packed.row_bytes)
        stored = np.memmap(self.path, np.uint8, "r", packed.start, rows)
        array = np.asarray(gguf_package().dequantize(stored, _ggml_type(packed.type, name, self.path)))
        return array.copy() if np.may_share_memory(array, stored) else array


def gguf_package() -> ModuleType:
    """The optional gguf package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the gguf package; install it: pip install 'melora_jax[gguf]'") from error
    return gguf


def _ggml_type(number: int, tensor: str, path: Path) -> Any:
    """A ggml type as the gguf package names it; raises ValueError unless the package can unpack it."""
    gguf = gguf_package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(
            f"tensor {tensor} in {path} is of ggml type {number}, which the gguf package does not know; upgrade it"
        ) from error
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise ValueError(
            f"tensor {tensor} in {path} is packed as {kind.name}, which the gguf package can't unpack; use a file of"
            " another quantisation, such as Q8_0 or F16"
        ) from error
    return kind


def _decimal(value: float) -> float:
    """The shortest decimal that float32 rounds to `value`: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _require_whole(fields: dict[str, Any], path: Path) -> None:
    if fields.get("split.count", 1) != 1:
        raise ValueError(
            f"{path} is one of the {fields['split.count']!r:.9} parts of a split GGUF file, which are not read; join"
            " them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        )


class _Header:
    """Reads a header from its first byte to its last; a length beyond the end of the file is refused."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self._data, self._path, self._offset = data, path, 0

    def require_readable(self) -> None:
        if bytes(self._data[: len(_MAGIC)]) != _MAGIC:
            raise ValueError(f"{self._path} is not a GGUF file: it does not begin with GGUF; check what it is")
        self._offset = len(_MAGIC)
        version = self.number("I")
        if version not in _VERSIONS:
            big = version & 0xFFFF == 0
            kind = "of a big-endian machine" if big else f"of version {version}, only 2 and 3 are read"
            raise ValueError(f"{self._path} is a GGUF file {kind}; convert the model again on this machine")

    def number(self, code: str) -> Any:
        """One number, of a `struct` code."""
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def fields(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._text()
            if key in found:
                raise self._damaged(f"the key {key[:99]!r} appears twice")
            found[key] = self._value(self.number("I"))
        return found

    def tensors(self, count: int, alignment: object) -> dict[str, Packed]:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment={alignment!r} is not a power of two")
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text()
            if name in found:
                raise self._damaged(f"tensor {name[:99]!r} appears twice")
            dimensions = self.number("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise self._damaged(f"tensor {name[:99]!r} has {dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
            found[name] = (shape, self.number("I"), self.number("Q"))
        start = -(-self._offset // alignment) * alignment
        kinds = {kind: _ggml_type(kind, name, self._path) for name, (_, kind, _) in found.items()}
        return {
            name: self._packed(name, shape, kinds[kind], start + offset)
            for name, (shape, kind, offset) in found.items()
        }

    def _packed(self, name: str, shape: tuple[int, ...], kind: Any, start: int) -> Packed:
        block, size = gguf_package().GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise self._damaged(f"tensor {name[:99]!r} of shape {list(shape)} can't be packed as {kind.name}")
        row_bytes = shape[-1] // block * size
        if start + math.prod(shape[:-1]) * row_bytes > len(self._data):
            raise self._damaged(f"tensor {name[:99]!r} of shape {list(shape)} ends after the last byte of the file")
        return Packed(shape=shape, type=int(kind), start=start, row_bytes=row_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        if kind not in _SCALARS:
            raise self._damaged(f"a value is of type {kind}, which GGUF does not have")
        number = self.number(_SCALARS[kind])
        return _decimal(number) if kind == _FLOAT32 else number

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self._text() for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged(f"a list holds values of type {kind}, which is not read")
        size = struct.calcsize(f"<{_SCALARS[kind]}")
        return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * size)))

    def _text(self) -> str:
        # not by number(): a vocabulary has some 100,000 texts
        size = self._offset + _LENGTH.size
        if size > len(self._data):
            raise self._damaged("it ends there")
        (length,) = _LENGTH.unpack_from(self._data, self._offset)
        self._offset = size
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("text is not UTF-8") from error

    def _take(self, size: int) -> memoryview:
        if size > len(self._data) - self._offset:
            raise self._damaged(f"{size} bytes are declared, {len(self._data) - self._offset} are left")
        taken = self._data[self._offset : self._offset + size]
        self._offset += size
        return taken

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self._path} is damaged or incomplete: {what} (byte {self._offset} of its header); fetch it again"
        )
