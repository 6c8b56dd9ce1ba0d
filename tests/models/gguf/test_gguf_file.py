"""The bytes of GGUF files: packings, and files that are damaged or mean harm."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import melora_jax as mj
from melora_jax.models.gguf.reader import GGUFFile
from melora_jax.models.gguf.tensors import GGUFTensors
from tests.models.gguf.gguf_fixtures import gguf_writer, write_fields


@pytest.mark.parametrize("packing", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS"])
def test_blocks_of_256_are_unpacked(packing: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[packing]
    bits = np.random.default_rng(3).integers(0, 60, (5, 2 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    with gguf_writer(tmp_path / "model.gguf", "llama") as writer:
        writer.add_tensor("token_embd.weight", bits, raw_dtype=kind)
    file = GGUFFile(tmp_path / "model.gguf")
    array = file.read("token_embd.weight")
    assert array.shape == (5, 512)
    assert np.isfinite(array).all()
    np.testing.assert_array_equal(array, gguf.dequantize(bits, kind))


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    file = GGUFFile(write_fields(tmp_path / "model.gguf", {}))
    array = file.read("token_embd.weight")
    (tmp_path / "model.gguf").write_bytes(b"")
    array += 1.0
    assert array.sum() == 2 * 11 * 12


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(fields: int = 0, tensors: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def tensor(shape: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "nothing": (b"", "is empty"),
    "10 MB of junk": (b"\xa5" * 10_000_000, "is not a GGUF file"),
    "10 MB of junk behind the magic": (b"GGUF\3\0\0\0" + b"\xa5" * 10_000_000, "are declared, .* are left"),
    "version 1": (header(version=1), "of version 1, only 2 and 3 are read"),
    "big-endian": (header(version=3 << 24), "of a big-endian machine"),
    "more fields than bytes": (header(fields=2**63), "it ends there"),
    "more tensors than bytes": (header(tensors=2**63), "it ends there"),
    "a long key": (header(fields=1, body=struct.pack("<Q", 2**62)), "are declared, 0 are left"),
    "no text": (header(fields=1, body=struct.pack("<Q", 1) + b"\xff"), "text is not UTF-8"),
    "a type GGUF lacks": (header(fields=1, body=string("k") + struct.pack("<I", 99)), "a value is of type 99"),
    "a long list": (
        header(fields=1, body=string("k") + struct.pack("<IIQ", 9, 4, 2**62)),
        "18446744073709551616 bytes are declared, 0 are left",
    ),
    "a long list of texts": (header(fields=1, body=string("k") + struct.pack("<IIQ", 9, 8, 2**62)), "it ends there"),
    "a list of lists": (
        header(fields=1, body=string("k") + struct.pack("<IIQ", 9, 9, 1)),
        "a list holds values of type 9",
    ),
    "a key twice": (header(fields=2, body=2 * (string("k") + struct.pack("<II", 4, 1))), "the key 'k' appears twice"),
    "a tensor twice": (header(tensors=2, body=2 * tensor() + bytes(64)), "tensor 't' appears twice"),
    "an alignment of 3": (
        header(fields=1, body=string("general.alignment") + struct.pack("<II", 4, 3)),
        "general.alignment=3 is not a power of two",
    ),
    "no dimensions": (header(tensors=1, body=tensor(())), "tensor 't' has 0 dimensions"),
    "a thousand dimensions": (header(tensors=1, body=string("t") + struct.pack("<I", 1000)), "has 1000 dimensions"),
    "a huge shape": (header(tensors=1, body=tensor((2**62, 2**62))), "ends after the last byte of the file"),
    "an empty shape": (header(tensors=1, body=tensor((0, 2))), "can't be packed as F32"),
    "half a block": (
        header(tensors=1, body=tensor((33,), kind=8) + bytes(99)),
        r"of shape \[33\] can't be packed as Q8_0",
    ),
    "an offset behind the end": (
        header(tensors=1, body=tensor(offset=2**62) + bytes(64)),
        "ends after the last byte",
    ),
    "an unknown packing": (header(tensors=1, body=tensor(kind=250)), "is of ggml type 250, which the gguf package"),
    "a packing of no floats": (
        header(tensors=1, body=tensor(kind=26)),
        "is packed as I32, which the gguf package can't",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        mj.from_pretrained(tmp_path / "model.gguf", task="causal-lm")
    assert "model.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content = write_fields(tmp_path / "model.gguf", {"tokenizer.ggml.tokens": ["a", "bc"]}).read_bytes()
    assert GGUFFile(tmp_path / "model.gguf").tensors
    end = len(content) - 1 - (-11 * 12 * 4) % 32  # the last bytes only fill up
    for size in range(0, end + 1, 7):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            GGUFFile(tmp_path / "cut.gguf")


@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_changed_byte_is_refused_or_harmless(
    changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed"
    if not folder.exists():
        folder.mkdir()
        write_fields(folder / "whole.gguf", {"tokenizer.ggml.tokens": ["a", "bc"]})
    content = bytearray((folder / "whole.gguf").read_bytes())
    for place, byte in changes:
        content[place % (len(content) - 600)] = byte
    (folder / "model.gguf").write_bytes(content)
    with suppress(ValueError):
        file = GGUFTensors(folder / "model.gguf")
        for key in file.keys():
            assert file.read(key).shape == file.shape(key)
