"""The tensors of an adapter in PEFT's format, or in that of the authors' fork of PEFT, as they lie in the file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from melora_jax.checkpoints.native_format import require_finite
from melora_jax.checkpoints.peft.export import PEFT_TENSORS, PREFIX
from melora_jax.files.safetensors_io import TensorFile
from melora_jax.files.torch_pickle import read_torch_archive

PICKLED_TENSORS = "adapter_model.bin"
_FACTOR = re.compile(r"(?P<site>.+)\.lora_(?P<lookup>embedding_)?(?P<side>[AB])(\.(?P<mini>\d+|default))?(\.weight)?")
_MAGNITUDE = re.compile(r"(?P<site>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")


@dataclasses.dataclass
class StoredSite:
    """The factors of one site as they lie in the file, by side ("A" or "B") and mini ("" where there are none)."""

    lookup: bool
    magnitude: np.ndarray | None = None
    factors: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)


def read_tensors(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The file that holds the tensors, and them: without PEFT's prefix, floating and finite, as float32.

    Raises:
      FileNotFoundError: no such adapter folder.
      ValueError: a damaged file, or a tensor of another name or dtype, or that is not finite.
    """
    file = folder / PEFT_TENSORS
    if file.is_file():
        with TensorFile(file) as stored:
            tensors = {key: stored.read(key) for key in stored.keys()}
    elif (folder / PICKLED_TENSORS).is_file():
        file = folder / PICKLED_TENSORS
        tensors = read_torch_archive(file)
    else:
        raise FileNotFoundError(f"{folder} is not a PEFT adapter: it has neither {PEFT_TENSORS} nor {PICKLED_TENSORS}")
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{file}: {key} does not begin with {PREFIX!r}, as PEFT's names do; is it another's file?")
        if value.dtype.kind not in "fV" or value.dtype.itemsize > 4:  # bfloat16 is of kind V
            raise ValueError(f"{file}: {key} is {value.dtype}; convert it to float32, float16 or bfloat16 first")
    require_finite(tensors, file)
    return file, {key.removeprefix(PREFIX): value.astype(np.float32) for key, value in tensors.items()}


def sort_tensors(tensors: Mapping[str, np.ndarray], file: Path) -> tuple[dict[str, StoredSite], dict[str, np.ndarray]]:
    """The tensors that are factors by their site's path, and the others by their name.

    Raises:
      ValueError: there are no factors, a factor occurs twice or is not a matrix, or norms have no factors.
    """
    sites: dict[str, StoredSite] = {}
    others: dict[str, np.ndarray] = {}
    magnitudes: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        if norms := _MAGNITUDE.fullmatch(key):
            magnitudes[norms["site"].replace(".", "/")] = value
            continue
        if ".original_module." in key:
            continue  # with bias="all" PEFT writes a saved module's bias as it was before training too
        found = _FACTOR.fullmatch(key)
        if found is None:
            others[re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", key)] = value
            continue
        path, mini = found["site"].replace(".", "/"), found["mini"] or ""
        side = (found["side"], "" if mini == "default" else mini)
        site = sites.setdefault(path, StoredSite(lookup=found["lookup"] is not None))
        if side in site.factors:
            raise ValueError(f"{file} holds lora_{side[0]} of {path} twice; remove one of them")
        if value.ndim != 2:
            raise ValueError(f"{file}: {key} has shape {list(value.shape)}; a factor is a matrix")
        site.factors[side] = value
    if not sites:
        raise ValueError(f"{file} holds no lora_A and lora_B; it is not an adapter of LoRA's kind")
    for path, magnitude in magnitudes.items():
        if path not in sites:
            raise ValueError(
                f"{file} holds norms of {path}, and no lora_A and lora_B beside them; save the adapter again"
            )
        sites[path].magnitude = magnitude.reshape(-1)
    return sites, others
