"""The tensors of a PyTorch archive, such as `adapter_model.bin`, read without running anything that is in it.

Such a file is a zip archive of raw storages and one pickle, a program for a small stack machine. A real unpickler calls
whatever function that program names. The interpreter here knows the few instructions that build a dict of tensors, and
of functions only torch's two rebuilders and `OrderedDict`; it refuses everything else by name.

A `pickle.Unpickler` with a restricted `find_class` is not as safe: one memo instruction of 5 bytes makes it allocate
gigabytes, and a deeply nested tuple as a key crashes the interpreter before any method of ours is asked.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
import reprlib
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from melora_jax.files.dtypes import TORCH_STORAGES

_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = ("collections", "OrderedDict")
_KNOWN = {_TENSOR, _PARAMETER, _ORDERED_DICT, *(("torch", name) for name in TORCH_STORAGES)}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TEXTS_AND_NUMBERS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_REMEDY = "do not trust this file; ask for a safetensors file"
_MOST_AXES = 64  # NumPy's limit
# Tensors may share a storage, as tied weights do; tensors that together take more than this are a bomb.
_MOST_SHARING = 8


def read_torch_archive(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a file that `torch.save(state_dict, path)` wrote, by name; nothing in the file is executed.

    Args:
      path: the file, of torch 1.6 or later.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a zip archive of torch's layout, or its pickle does anything but build a dict of
        tensors.

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
    except (zipfile.BadZipFile, NotImplementedError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not an archive of torch 1.6 or later, or is damaged ({error}); {_REMEDY}"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise ValueError(f"{path} holds something other than a dict of tensors; {_REMEDY}")
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

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class _Interpreter:
    """The stack machine. Its values are dicts, tuples, strings, numbers, None, names, storages and tensors.

    A hostile program nests tuples so deeply, or shares them so often, that comparing, hashing or printing one would not
    end. Values are therefore compared and hashed only once their type is known, and printed by `_shown`.
    """

    def __init__(self, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> None:
        self._archive = archive
        self._members = members
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, bytes] = {}
        self._bytes_left = _MOST_SHARING * path.stat().st_size

    def run(self, program: bytes) -> Any:
        """What the program leaves on the stack."""
        try:
            for opcode, argument, position in pickletools.genops(program):
                self._step(opcode.name, argument, position)
            (result,) = self._stack
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
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
                stack.append(self._storage(stack.pop()))
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
            raise TypeError("items are set on something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise TypeError(f"the key {_shown(key)} is not a name")
            if key in target:
                raise ValueError(f"{self._path} holds {_shown(key)} twice; {_REMEDY}")
            target[key] = value

    def _ignore_metadata(self, state: Any) -> None:
        """A state dict carries the versions of its modules as an attribute; nothing here needs them."""
        if not isinstance(self._stack[-1], dict) or not isinstance(state, dict) or state.keys() != {"_metadata"}:
            raise ValueError(f"{self._path} sets attributes of an object; {_REMEDY}")

    def _named(self, module: Any, name: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError(f"{_shown(module)} and {_shown(name)} do not name a function")
        if (module, name) not in _KNOWN:
            asked = _shown(f"{module}.{name}")[1:-1]
            raise ValueError(f"{self._path} asks for {asked}, which builds no tensor; {_REMEDY}")
        return _Name(module, name)

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, _Name) and isinstance(arguments, tuple):
            match (function.module, function.name):
                case ("torch._utils", "_rebuild_tensor_v2") if len(arguments) >= 4:
                    return self._tensor(*arguments[:4])
                case ("torch._utils", "_rebuild_parameter") if arguments:
                    return arguments[0]
                case ("collections", "OrderedDict") if not arguments:
                    return {}
        called = f"{_shown(function)} with {_shown(arguments)}"
        raise ValueError(f"{self._path} calls {called}, which builds no tensor; {_REMEDY}")

    def _storage(self, identifier: Any) -> np.ndarray:
        """The storage that a persistent id names, from its own file in the archive."""
        match identifier:
            case ("storage", _Name("torch", dtype), str(key), str(), int()) if key.isascii() and key.isdecimal():
                if key not in self._storages:
                    self._storages[key] = self._archive.read(self._members[f"data/{key}"])
                return np.frombuffer(self._storages[key], dtype=TORCH_STORAGES[dtype])
        raise ValueError(f"{self._path} asks for {_shown(identifier)}, which is not a storage of torch's; {_REMEDY}")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
        """A copy of the view of `storage` that torch's numbers describe, once it is known to lie inside it."""
        are_tuples = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) <= _MOST_AXES
        numbers = (offset, *size, *stride) if are_tuples else (None,)
        if not isinstance(storage, np.ndarray) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("a tensor is not given by its storage and whole numbers")
        count = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
        if count > storage.size or (count and last >= storage.size):
            raise ValueError(f"a tensor of shape {list(size)} reaches beyond its storage of {storage.size} numbers")
        self._bytes_left -= count * storage.itemsize
        if self._bytes_left < 0:
            raise ValueError(
                f"{self._path} has tensors that together take over {_MOST_SHARING} times its bytes; {_REMEDY}"
            )
        if not count:
            return np.zeros(size, storage.dtype)
        # the step of an axis of one entry is never taken, and may be any number
        strides = [step * storage.itemsize if length > 1 else 0 for length, step in zip(size, stride, strict=True)]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


class _Short(reprlib.Repr):
    """`repr` of bounded length and depth; names, which end an error's sentence, stand as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_ndarray(self, value: np.ndarray, level: int) -> str:
        return f"an array of {value.size} numbers"


_shown = _Short().repr
