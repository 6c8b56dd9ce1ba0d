"""JSON, safetensors, and writes that happen whole or not at all."""

from __future__ import annotations

import json
import os
import re
import resource
import struct
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from melora_jax.files.atomic import atomic_folder
from melora_jax.files.safetensors_io import TensorFile, read_json, write_tensors


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def no_file_larger_than(size: int):
    """Stands for a full disk: a write past `size` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1,\n  "b": }', "config.json line 2 column 8: Expecting value"),
        (b"[1, 2]", "config.json holds a JSON list where an object"),
        (b'{"a": "\xff"}', "config.json is not UTF-8 (invalid start byte at byte 7)"),
        (b"", "config.json line 1 column 1: Expecting value"),
    ],
)
def test_bad_json_is_refused_with_its_place(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.json does not exist; check"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors does not exist; check"):
        TensorFile(tmp_path / "nothing.safetensors")


TENSORS = {
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "transposed": np.arange(15, dtype=np.float32).reshape(3, 5).T,
    "strided": np.arange(14, dtype=np.float64)[::2],
    "bf16": np.array([1.0, -2.5, 3e38], ml_dtypes.bfloat16),
    "f16": np.ones((2, 0, 3), np.float16),
    "scalar": np.array(7, np.int64),
    "flags": np.array([True, False]),
}


def test_tensors_come_back_bitwise(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt", "made by": "test"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.keys() == sorted(TENSORS)
        assert file.metadata == {"format": "pt", "made by": "test"}
        for key, tensor in TENSORS.items():
            assert file.shape(key) == tensor.shape
            assert file.dtype(key) == tensor.dtype
            np.testing.assert_array_equal(file.read(key), tensor, strict=True)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["transposed"], TENSORS["transposed"])
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_unknown_tensor_is_named_with_the_nearest(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"query.weight": np.ones(2)}, {})
    with (
        TensorFile(tmp_path / "x.safetensors") as file,
        pytest.raises(
            ValueError, match=r"tensor qury.weight is not in .*x.safetensors; the nearest name is query.weight"
        ),
    ):
        file.read("qury.weight")


def raw(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 2), end=16) -> dict:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": [0, end]}}


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"PK\x03\x04 this is a zip",
        struct.pack("<Q", 2**60) + b"{}",
        raw(entry(), bytes(16))[:-3],
        raw(entry(), bytes(20)),
        raw(entry(shape=(2, 3)), bytes(16)),
        raw(entry(shape=(2, -2)), bytes(16)),
        raw(entry(end=2**50), bytes(16)),
        raw({"w": 3}, b""),
    ],
    ids=[
        "empty",
        "zip",
        "long header",
        "truncated",
        "surplus bytes",
        "lying shape",
        "negative",
        "far offset",
        "no spec",
    ],
)
def test_a_damaged_file_is_refused_and_named(tmp_path, damaged):
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"model.safetensors is truncated or is not a safetensors file .*fetch or save"
    ):
        TensorFile(tmp_path / "model.safetensors")


@given(position=st.integers(0, 79), byte=st.integers(0, 255))
def test_a_changed_byte_gives_a_tensor_or_a_value_error(tmp_path_factory, position, byte):
    path = tmp_path_factory.mktemp("changed") / "x.safetensors"
    good = bytearray(raw(entry(), bytes(16)))
    good[position] = byte
    path.write_bytes(good)
    with suppress(ValueError), TensorFile(path) as file:
        for key in file.keys():
            assert file.read(key).nbytes == 16


def test_a_type_that_numpy_lacks_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(raw(entry("F8_E4M3", (4,), 4), bytes(4)))
    with (
        TensorFile(tmp_path / "x.safetensors") as file,
        pytest.raises(ValueError, match=r"tensor w in .* is stored as F8_E4M3; convert it"),
    ):
        file.read("w")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": np.ones(3)}, {})
    before = content(tmp_path)
    with no_file_larger_than(1000), pytest.raises(OSError, match=r"cannot write .*x.safetensors: .*; free some space"):
        write_tensors(path, {"w": np.ones(1000)}, {})
    assert content(tmp_path) == before


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    write_tensors(tmp_path / "x.safetensors", {"w": np.ones(3)}, {})
    before = content(tmp_path)

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr("melora_jax.files.safetensors_io.os.replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_tensors(tmp_path / "x.safetensors", {"w": np.zeros(3)}, {})
    assert content(tmp_path) == before


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "saved"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("1")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("2")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert content(target) == {"a": b"1", "sub/b": b"2"}
    assert [entry.name for entry in target.parent.iterdir()] == ["saved"]


def test_a_folder_is_replaced(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "a").write_text("old")
    with atomic_folder(tmp_path / "saved") as temporary:
        (temporary / "a").write_text("new")
        (temporary / "b").write_text("more")
    assert content(tmp_path) == {"saved/a": b"new", "saved/b": b"more"}


def test_a_linked_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {"a": b"new"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_folder(tmp_path, error):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "a").write_text("old")

    def write():
        with atomic_folder(tmp_path / "saved") as temporary:
            (temporary / "a").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert content(tmp_path) == {"saved/a": b"old"}


def test_a_failing_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "a").write_text("old")
    rename = os.rename

    def fails_to_move_the_new_one(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr("melora_jax.files.atomic.os.rename", fails_to_move_the_new_one)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "saved") as temporary:
        (temporary / "a").write_text("new")
    assert content(tmp_path) == {"saved/a": b"old"}


def test_files_that_would_be_lost_are_kept_and_named(tmp_path):
    (tmp_path / "home").mkdir()
    for name in "abcde":
        (tmp_path / "home" / name).write_text("mine")
    before = content(tmp_path)
    message = r"home holds files that would be lost \(b, c, d and 1 more\); choose an empty folder"
    with pytest.raises(ValueError, match=message), atomic_folder(tmp_path / "home") as temporary:
        (temporary / "a").write_text("new")
    assert content(tmp_path) == before


def test_what_cannot_be_replaced_is_refused_before_work(tmp_path, monkeypatch):
    def write(folder):
        with atomic_folder(folder):
            pytest.fail("work began")

    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="is a file where a folder is to be written"):
        write(tmp_path / "file")
    with pytest.raises(ValueError, match="is a mount point"):
        write("/proc")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds the working directory"):
        write(".")
    assert content(tmp_path) == {"file": b"old"}
