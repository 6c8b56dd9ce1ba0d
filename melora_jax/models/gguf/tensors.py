"""GGUF files as checkpoints: their tensors by Hugging Face's names and in its layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from melora_jax.models.gguf.config import ROPE_FACTORS, architecture_of, config_from_gguf, modules_of
from melora_jax.models.gguf.reader import GGUFFile


class GGUFTensors:
    """The tensors of a GGUF file, read one at a time as `TensorFile` reads those of safetensors.

    They are dequantised to float32, and llama.cpp's changes are undone: the rows of a Llama's queries and keys are put
    back in order, and the 1 that was added to Gemma's norms is subtracted.

    Args:
      path: the file.

    Attributes:
      path: the file.
      config: what its config.json would hold.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged or split, or its architecture, a hyperparameter, a tensor or its packing is not
        supported; or the gguf package is missing.

    >>> GGUFTensors("model.gguf")
    Traceback (most recent call last):
    FileNotFoundError: model.gguf does not exist; check the name, or fetch the file again
    """

    def __init__(self, path: str | Path) -> None:
        self._file = GGUFFile(path)
        self.path = self._file.path
        factors = self._file.read(ROPE_FACTORS) if ROPE_FACTORS in self._file.tensors else None
        self._architecture = architecture_of(self._file)
        modules = modules_of(self._file.fields["general.architecture"])
        self.config: dict[str, Any] = config_from_gguf(self._file, factors)
        self._names: dict[str, str] = {}
        for name in set(self._file.tensors) - {ROPE_FACTORS}:
            stem, _, leaf = name.rpartition(".")
            layer = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", stem)
            module = modules.get(f"blk.0.{layer[2]}" if layer else stem)
            if module is None or leaf not in ("weight", "bias"):
                raise ValueError(
                    f"tensor {name[:99]!r} in {self.path} has no place in a {self._architecture.model_type}; use"
                    " another model"
                )
            module = module.replace(".0.", f".{int(layer[1])}.", 1) if layer else module
            self._names[f"{module}.{leaf}"] = name

    def keys(self) -> list[str]:
        """The Hugging Face names of the tensors, sorted."""
        return sorted(self._names)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of tensor `key`, from the header alone."""
        return self._file.tensors[self._names[key]].shape

    def dtype(self, key: str) -> np.dtype:
        """The dtype that `read` gives, however the tensor is packed: float32."""
        return np.dtype(np.float32)

    def read(self, key: str) -> np.ndarray:
        """Tensor `key` as float32, in Hugging Face's layout."""
        array = self._file.read(self._names[key])
        if self._architecture.gemma_period and key.endswith("norm.weight"):
            return array - np.float32(1.0)
        if self._architecture.model_type == "llama":
            for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f".{projection}." in key:
                    return unpermuted(array, self.config[heads])
        return array

    def read_part(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of tensor `key` that `index` cuts out; packed tensors are unpacked whole."""
        return self.read(key)[index]


def unpermuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in Hugging Face's order; llama.cpp puts the two rows that RoPE turns next to each other.

    Args:
      array: a weight `[heads · d, d_in]` or bias `[heads · d]`.
      heads: number of heads.

    Raises:
      ValueError: `heads` does not divide the rows into pairs.

    >>> unpermuted(np.array([0, 3, 1, 4, 2, 5]), heads=1)
    array([0, 1, 2, 3, 4, 5])
    """
    if array.shape[0] % (2 * heads):
        raise ValueError(f"{array.shape[0]} rows do not make {heads} heads of pairs; fetch the file again")
    paired = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return paired.swapaxes(1, 2).reshape(array.shape)
