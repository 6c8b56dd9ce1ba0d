"""PyTorch's archives without torch: the tensors that torch wrote, and every trick in such a file refused by name."""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from melora_jax.files.torch_pickle import read_torch_archive


class Raw(bytes):
    """Instructions of a pickle as they are."""


def pickled(value: Any) -> bytes:
    """The instructions that push a value, as protocol 2 has them."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(pickled, value)) + b"t"
    return b"}(" + b"".join(pickled(part) for item in value.items() for part in item) + b"u"


def named(module: str, name: str) -> Raw:
    return Raw(f"c{module}\n{name}\n".encode())


def called(function: bytes, *arguments: Any) -> Raw:
    return Raw(function + pickled(arguments) + b"R")


def storage(key: str = "0", kind: str = "FloatStorage", word: str = "storage", count: int = 6) -> Raw:
    return Raw(pickled((word, named("torch", kind), key, "cpu", count)) + b"Q")


REBUILD = named("torch._utils", "_rebuild_tensor_v2")
EMPTY = called(named("collections", "OrderedDict"))


def tensor(data: Raw | None = None, offset: Any = 0, size: Any = (2, 3), stride: Any = (3, 1)) -> Raw:
    return called(REBUILD, data or storage(), offset, size, stride, False, EMPTY)


NUMBERS = np.arange(6, dtype=np.float32)


def archive(path: Path, value: Any, members: Mapping[str, bytes] | None = None, **options: Any) -> Path:
    """A file laid out as torch's, with `value` as its data.pkl."""
    with zipfile.ZipFile(path, "w", **options) as file:
        program = value if isinstance(value, bytes) else b"\x80\x02" + pickled(value) + b"."
        for name, data in {"data.pkl": program, "data/0": NUMBERS.tobytes(), **(members or {})}.items():
            file.writestr(f"adapter_model/{name}", data)
    return path


def test_views_of_a_storage_are_read_as_they_lie(tmp_path: Path) -> None:
    value = {
        "whole": tensor(),
        "turned": tensor(size=(3, 2), stride=(1, 3)),
        "part": tensor(offset=4, size=(2,), stride=(1,)),
        "number": tensor(offset=5, size=(), stride=()),
        "nothing": tensor(size=(0, 3), stride=(3, 1)),
        "parameter": called(named("torch._utils", "_rebuild_parameter"), tensor(), True, EMPTY),
    }
    found = read_torch_archive(archive(tmp_path / "x.bin", value, {"byteorder": b"little", "version": b"3\n"}))
    expected = {
        "whole": NUMBERS.reshape(2, 3),
        "turned": NUMBERS.reshape(2, 3).T,
        "part": NUMBERS[4:],
        "number": NUMBERS[5],
        "nothing": np.zeros((0, 3), np.float32),
        "parameter": NUMBERS.reshape(2, 3),
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.float32


@pytest.mark.parity
def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(3, 5)  # its state dict carries versions as an attribute
    mixed = {
        "half": torch.randn(4, generator=generator).half(),
        "brain": torch.randn(2, 3, generator=generator).bfloat16(),
        "turned": torch.randn(4, 6, generator=generator).T,
        "parameter": torch.nn.Parameter(torch.randn(7, generator=generator)),
        "whole": torch.arange(5),
        "flag": torch.tensor([True, False]),
    }
    for number, state in enumerate((layer.state_dict(), mixed)):
        torch.save(state, tmp_path / f"{number}.bin")
        found = read_torch_archive(tmp_path / f"{number}.bin")
        assert list(found) == list(state)
        for name, value in state.items():
            is_brain = value.dtype == torch.bfloat16
            expected = value.detach().float().numpy() if is_brain else value.detach().numpy()
            assert found[name].dtype == (ml_dtypes.bfloat16 if is_brain else expected.dtype)
            np.testing.assert_array_equal(found[name].astype(expected.dtype), expected)


class Payload:
    """Unpickled by a real unpickler, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


# A tuple in a tuple, and so on: hashing or printing it takes more of the stack than there is.
DEEP = Raw(b")" + b"\x85" * 200_000)
# A tuple of two of the same, and so on: its text would have 2¹⁰⁰ entries.
ENDLESS = Raw(b")" + b"q\x00h\x00\x86" * 100)

HOSTILE: dict[str, tuple[Any, str]] = {
    "a function": (
        {"x": called(named("posix", "system"), "true")},
        "asks for posix.system, which builds no tensor; do",
    ),
    "eval": ({"x": called(named("builtins", "eval"), "1")}, "asks for builtins.eval, which builds no tensor; do not"),
    "torch's loader": ({"x": named("torch", "load")}, "asks for torch.load, which builds no tensor; do not trust"),
    "a call of a dict": (
        {"x": called(Raw(b"}"), "a")},
        "calls {} with ('a',), which builds no tensor; do not trust this file",
    ),
    "a filled OrderedDict": (
        {"x": called(named("collections", "OrderedDict"), (("a", 1),))},
        "calls collections.OrderedDict with ((('a', 1),),), which builds no tensor",
    ),
    "an old-style object": (
        b"\x80\x02(iposix\nsystem\n.",
        "byte 3 of data.pkl is the instruction INST; do not trust this file; ask for a safetensors file",
    ),
    "an object's state": (
        {"x": Raw(bytes(tensor()) + pickled({"a": 1}) + b"b")},
        "sets attributes of an object; do not trust this file; ask for a safetensors file",
    ),
    "an extension": (b"\x80\x02\x82\x01.", "is the instruction EXT1; do not trust this file"),
    "a key twice": (
        Raw(b"\x80\x02}(" + (pickled("a") + pickled(tensor())) * 2 + b"u."),
        "holds 'a' twice; do not trust",
    ),
    "no dict": (pickled(("a",)) + b".", "holds something other than a dict of tensors; do not trust this file"),
    "no tensor": ({"x": "y"}, "holds something other than a dict of tensors; do not trust this file"),
    "beyond the storage": (
        {"x": tensor(size=(3, 3))},
        "a tensor of shape [3, 3] reaches beyond its storage of 6 numbers",
    ),
    "before it": ({"x": tensor(offset=-4)}, "a tensor is not given by its storage and whole numbers"),
    "past its end": ({"x": tensor(offset=1)}, "a tensor of shape [2, 3] reaches beyond its storage of 6 numbers"),
    "a bomb of strides": (
        {"x": tensor(size=(1 << 20, 1 << 20), stride=(0, 0))},
        "a tensor of shape [1048576, 1048576] reaches beyond its storage of 6 numbers",
    ),
    "another file": (
        {"x": tensor(storage("../../secret"))},
        "asks for ('storage', torch.FloatStorage, '../../secret', 'cpu', 6), which",
    ),
    "no such storage": ({"x": tensor(storage("9"))}, "has a damaged data.pkl ('data/9'); fetch it again"),
    "another kind": (
        {"x": tensor(storage(word="module"))},
        "asks for ('module', torch.FloatStorage, '0', 'cpu', 6), which is not a storage",
    ),
    "an unfinished program": (b"\x80\x02}(", "has a damaged data.pkl (pickle exhausted before seeing STOP); fetch it"),
    "an empty stack": (b"\x80\x020.", "is the instruction POP; do not trust this file"),
    "nothing to call": (b"\x80\x02R.", "has a damaged data.pkl (the stack is empty); fetch it again"),
    "no mark": (b"\x80\x02t.", "has a damaged data.pkl (pop from empty list); fetch it again"),
    "memory": (b"\x80\x02h\x05.", "has a damaged data.pkl (5); fetch it again"),
    "os.system": ({"x": called(named("os", "system"), "true")}, "asks for os.system, which builds no tensor; do not"),
    "a function by its parts": (
        {"x": called(Raw(pickled("os") + pickled("system") + b"\x93"), "true")},
        "asks for os.system, which builds no tensor; do not trust this file",
    ),
    "a call within a call": (
        {"x": called(REBUILD, called(named("builtins", "eval"), "1"), 0, (2, 3), (3, 1), False, EMPTY)},
        "asks for builtins.eval, which builds no tensor; do not trust this file",
    ),
    "a call of what a call returned": ({"x": called(tensor(), "a")}, "calls an array of 6 numbers with ('a',), which"),
    "a storage as a function": ({"x": called(named("torch", "FloatStorage"), 6)}, "calls torch.FloatStorage with (6,)"),
    "a name's state": (
        {"x": Raw(bytes(REBUILD) + pickled({"name": "system"}) + b"b")},
        "sets attributes of an object; do not trust this file; ask for a safetensors file",
    ),
    "a state dict's state": (
        {"x": Raw(bytes(EMPTY) + pickled({"__class__": "x"}) + b"b")},
        "sets attributes of an object; do not trust this file; ask for a safetensors file",
    ),
    "a name that is none": (
        {"x": Raw(DEEP + pickled("system") + b"\x93")},
        "and 'system' do not name a function); fetch it again",
    ),
    "a deep key": (Raw(b"\x80\x02}" + DEEP + b"Ns."), "is not a name); fetch it again"),
    "a deep call": ({"x": called(DEEP, "a")}, "with ('a',), which builds no tensor; do not trust this file"),
    "a key of endless length": (Raw(b"\x80\x02}" + ENDLESS + b"Ns."), "is not a name); fetch it again"),
    "a deep persistent id": ({"x": Raw(DEEP + b"Q")}, "which is not a storage of torch's; do not trust this file"),
    "a number as a persistent id": ({"x": Raw(pickled(5) + b"Q")}, "asks for 5, which is not a storage of torch's"),
    "a dict as a storage's type": (
        {"x": tensor(Raw(pickled(("storage", {}, "0", "cpu", 6)) + b"Q"))},
        "asks for ('storage', {}, '0', 'cpu', 6), which is not a storage of torch's; do not trust",
    ),
    "a tensor's function as a storage's type": (
        {"x": tensor(Raw(pickled(("storage", REBUILD, "0", "cpu", 6)) + b"Q"))},
        "asks for ('storage', torch._utils._rebuild_tensor_v2, '0', 'cpu', 6), which is not a storage",
    ),
    "a memo's far end": (Raw(b"\x80\x02}r\xff\xff\xff\xff" + b"h\x00."), "has a damaged data.pkl (0); fetch it"),
    "a step beyond all numbers": (
        {"x": tensor(size=(2, 3), stride=(Raw(b"\x8a\x10" + b"\x7f" * 16), 1))},
        "a tensor of shape [2, 3] reaches beyond its storage of 6 numbers",
    ),
    "many axes": ({"x": tensor(size=(1,) * 65, stride=(1,) * 65)}, "a tensor is not given by its storage and whole"),
    "junk": (np.random.default_rng(1).bytes(1000), "has a damaged data.pkl ("),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_nothing_is_run(name: str, tmp_path: Path) -> None:
    value, message = HOSTILE[name]
    path = archive(tmp_path / "adapter_model.bin", bytes(value) if isinstance(value, Raw) else value)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_torch_archive(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_tensors_share_a_storage_within_bounds(tmp_path: Path) -> None:
    storages = {"data/1": bytes(40_000)}

    def state(count: int) -> dict[str, Raw]:
        whole = tensor(storage("1", count=10_000), size=(10_000,), stride=(1,))
        return {f"x{number}": whole for number in range(count)}

    assert len(read_torch_archive(archive(tmp_path / "tied.bin", state(2), storages))) == 2
    path = archive(tmp_path / "bomb.bin", state(20), storages)
    with pytest.raises(ValueError, match=r"has tensors that together take over 8 times its bytes; do not trust"):
        read_torch_archive(path)


def test_a_payload_of_pickles_own_is_not_run(tmp_path: Path) -> None:
    import pickle

    path = archive(tmp_path / "x.bin", pickle.dumps({"x": Payload(tmp_path / "made")}, protocol=2))
    with pytest.raises(ValueError, match=r"asks for posix.mkdir, which builds no tensor"):
        read_torch_archive(path)
    assert not (tmp_path / "made").exists()


def test_archives_of_another_layout_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with pytest.raises(FileNotFoundError, match=r"x.bin does not exist; check the folder's name"):
        read_torch_archive(path)
    path.write_bytes(np.random.default_rng(0).bytes(10_000_000))
    with pytest.raises(
        ValueError, match=r"is not an archive of torch 1.6 or later, or is damaged \(File is not a zip file"
    ):
        read_torch_archive(path)
    archive(path, {"x": tensor()}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="has compressed or encrypted files, which torch never writes; do not trust"):
        read_torch_archive(path)
    archive(path, {"x": tensor()}, {"byteorder": b"big"})
    with pytest.raises(ValueError, match="was written on a big-endian machine; save it there as safetensors"):
        read_torch_archive(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("adapter_model/other", b"")
    with pytest.raises(ValueError, match=r"is not laid out as torch does it, one folder with a data.pkl; do not trust"):
        read_torch_archive(path)
    archive(path, {"x": tensor()})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="or is damaged"):
        read_torch_archive(path)
