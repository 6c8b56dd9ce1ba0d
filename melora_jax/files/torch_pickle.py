"""The tensors of a PyTorch archive, such as `adapter_model.bin`, read without running anything that is in it.

Such a file is a zip archive of raw storages and one pickle, a program for a small stack machine. A real unpickler calls
whatever function that program names. The interpreter here knows the few instructions that build a dict of tensors, and
of functions only torch's two rebuilders and `OrderedDict`; it refuses all else by name.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = ("collections", "OrderedDict")
_KNOWN = {_TENSOR, _PARAMETER, _ORDERED_DICT, *(("torch", name) for name in _STORAGES)}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TEXTS_AND_NUMBERS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_REMEDY = "do not trust this file; ask for a safetensors file"


def read_torch_archive(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(state_dict, path)` wrote, by name; nothing in the file is executed.

    Args:
      path: the file, of torch 1.6 or later.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no zip archive of torch's layout, or a pickle that does anything else than build a dict of tensors.

    >>> read_torch_archive("adapter_model.bin")
    Traceback (most recent call last):
    FileNotFoundError: adapter_model.bin does not exist; check the folder's name
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the folder's name")
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            interpreter = _Interpreter(archive, members, path)
            tensors = interpreter.run(archive.read(members["data.pkl"]))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is no archive of torch 1.6 or later, or is damaged ({error}); {_REMEDY}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise ValueError(f"{path} holds something else than a dict of tensors; {_REMEDY}")
    return tensors


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by their name below its one folder."""
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise ValueError(f"{path} has compressed or encrypted files, which torch never writes; {_REMEDY}")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise ValueError(f"{path} claims more bytes than it has; {_REMEDY}")
    members = {"/".join(PurePosixPath(info.filename).parts[1:]): info for info in infos}
    if "data.pkl" not in members or len(members) != len(infos):
        raise ValueError(f"{path} is not laid out as torch does it, one folder with a data.pkl; {_REMEDY}")
    if "byteorder" in members and archive.read(members["byteorder"]).strip() != b"little":
        raise ValueError(f"{path} was written on a big-endian machine; save it there as safetensors")
    return members


@dataclasses.dataclass(frozen=True)
class _Name:
    """A function or type that the pickle names; a word, never the thing itself."""

    module: str
    name: str


class _Interpreter:
    """The stack machine. Its values are dicts, tuples, strings, numbers, None, names, storages and tensors."""

    def __init__(self, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> None:
        self._archive = archive
        self._members = members
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """What the program leaves on the stack."""
        try:
            for opcode, argument, position in pickletools.genops(program):
                self._step(opcode.name, argument, position)
            (result,) = self._stack
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if str(error).startswith(str(self._path)):
                raise
            raise ValueError(f"{self._path} has a damaged data.pkl ({error}); fetch it again") from None
        return result

    def _step(self, opcode: str, argument: Any, position: int | None) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self._marks.append(len(stack))
            case _ if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            case _ if opcode in _TEXTS_AND_NUMBERS:
                stack.append(argument)
            case _ if opcode in _TUPLES:
                stack.append(tuple(self._pop(_TUPLES[opcode])))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                stack.append(self._named(*(argument.split(" ") if opcode == "GLOBAL" else self._pop(2))))
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "SETITEM" | "SETITEMS":
                self._set(self._pop(2) if opcode == "SETITEM" else self._pop_to_mark())
            case "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            case "REDUCE":
                stack.append(self._call(*self._pop(2)))
            case "BUILD":
                self._ignore_metadata(stack.pop())
            case _:
                raise ValueError(f"{self._path}: byte {position} of data.pkl is the instruction {opcode}; {_REMEDY}")

    def _pop(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise IndexError("the stack is empty")
        return [self._stack.pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        return self._pop(len(self._stack) - self._marks.pop())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("items are set on what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no name")
            if key in target:
                raise ValueError(f"{self._path} holds {key!r} twice; {_REMEDY}")
            target[key] = value

    def _ignore_metadata(self, state: Any) -> None:
        """A state dict carries the versions of its modules as an attribute; nothing here needs them."""
        if not isinstance(self._stack[-1], dict) or not isinstance(state, dict) or state.keys() != {"_metadata"}:
            raise ValueError(f"{self._path} sets attributes of an object; {_REMEDY}")

    def _named(self, module: str, name: str) -> _Name:
        if (module, name) not in _KNOWN:
            raise ValueError(f"{self._path} asks for {module}.{name}, which builds no tensor; {_REMEDY}")
        return _Name(module, name)

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        match (function.module, function.name) if isinstance(function, _Name) else None:
            case ("torch._utils", "_rebuild_tensor_v2"):
                return _tensor(*arguments[:4])
            case ("torch._utils", "_rebuild_parameter"):
                return arguments[0]
            case ("collections", "OrderedDict") if arguments == ():
                return {}
        raise ValueError(f"{self._path} calls {function!r}, which builds no tensor; {_REMEDY}")

    def _storage(self, kind: str, dtype: _Name, key: str, _location: str, _count: int) -> np.ndarray:
        """The storage that a persistent id names, from its own file in the archive."""
        if kind != "storage" or dtype.name not in _STORAGES or not (key.isascii() and key.isdecimal()):
            raise ValueError(f"{self._path} asks for {kind} {key!r}, which is no storage of torch's; {_REMEDY}")
        return np.frombuffer(self._archive.read(self._members[f"data/{key}"]), dtype=_STORAGES[dtype.name])


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    """A copy of the view of `storage` that torch's numbers describe, once it is known to lie inside it."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, np.ndarray) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor is not given by its storage and whole numbers")
    count = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if count > storage.size or (count and last >= storage.size):
        raise ValueError(f"a tensor of shape {list(size)} reaches beyond its storage of {storage.size} numbers")
    if not count:
        return np.zeros(size, storage.dtype)
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()
