"""The checkpoint of a model: its configuration and its files, in a folder, a GGUF file or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeAlias

import numpy as np

from melora_jax.files.safetensors_io import TensorFile, read_json
from melora_jax.models.base import HuggingFaceModel
from melora_jax.models.decoders.config import DecoderConfig, decoder_config
from melora_jax.models.encoders.config import EncoderConfig, encoder_config
from melora_jax.models.families import Family, family_of
from melora_jax.models.gguf.tensors import GGUFTensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
)
_FURTHER_FILES = (GENERATION_CONFIG, "*.safetensors", INDEX, *TOKENIZER_FILES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a file's header says of a tensor: the file, its shape in torch's layout, and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's configuration and the files that hold the model, opened once and handed on.

    Attributes:
      config: the content of config.json, or what it would hold for a GGUF file.
      where: the file that `config` is in, for errors.
      name: the folder, file or hub id that was asked for; "" for a configuration without files.
      source: the folder, which for a hub id is in the hub's cache, or the GGUF file; None without files.
      packed: the open GGUF file; None for a folder.

    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> checkpoint = Checkpoint(config={"model_type": "bert", **sizes})
    >>> checkpoint.family.prefix, checkpoint.sizes.num_layers, checkpoint.files
    ('bert', 1, {})
    """

    config: Mapping[str, Any]
    where: str = "config.json"
    name: str = ""
    source: Path | None = None
    packed: GGUFTensors | None = None

    @cached_property
    def family(self) -> Family:
        """The model family that the configuration names.

        Raises:
          ValueError: it is not supported.
        """
        return family_of(self.config, self.where)

    @cached_property
    def sizes(self) -> EncoderConfig | DecoderConfig:
        """The hyperparameters, under one set of names for all families.

        Raises:
          ValueError: the model is not supported, or a value is missing or impossible.
        """
        return (decoder_config if self.family.is_decoder else encoder_config)(self.config, self.where)

    @cached_property
    def files(self) -> dict[str, StoredTensor]:
        """Every tensor by its name, in the GGUF file, `model.safetensors`, or the files that its index names.

        Raises:
          FileNotFoundError: there are no safetensors, or a file that the index names is missing.
          ValueError: a file is damaged, a dtype is not supported, the index names a file outside the folder, or it
            contradicts the files.
        """
        if self.source is None:
            return {}
        return _stored(self.packed, self.source) if self.packed else _safetensors_in(self.source)

    @property
    def has_safetensors(self) -> bool:
        """Whether the folder is there, with safetensors in it."""
        return self.source is not None and any((self.source / name).is_file() for name in (WEIGHTS, INDEX))

    def opened(self, keys: Iterable[str]) -> Iterator[tuple[str, TensorFile | GGUFTensors]]:
        """Each of some tensors with its file; one file is open at a time.

        Args:
          keys: names in `files`.

        Raises:
          ValueError: a file is damaged.
        """
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.files[key].file, []).append(key)
        for file, names in sorted(by_file.items()):
            with contextlib.nullcontext(self.packed) if self.packed else TensorFile(file) as tensors:
                yield from ((name, tensors) for name in names)

    def read(self, key: str) -> np.ndarray:
        """One tensor, in the dtype it is stored in; that of a GGUF file as float32."""
        [array] = [tensors.read(name) for name, tensors in self.opened([key])]
        return array

    def require_equal(self, key: str, tied: str, dtype: np.dtype) -> None:
        """Checks that a second copy of a tensor, rounded to `dtype`, is equal to the one it is tied to.

        Raises:
          ValueError: they differ.
        """
        if not np.array_equal(self.read(key).astype(dtype), self.read(tied).astype(dtype)):
            raise ValueError(
                f"{key} in {self.files[key].file} differs from {tied}, but config.json ties the two; set"
                " tie_word_embeddings to false there"
            )

    @property
    def generation_config(self) -> Path | None:
        """The file of the settings for generating; None if there is none."""
        file = None if self.source is None else self.source / GENERATION_CONFIG
        return file if file is not None and file.is_file() else None


ModelSource: TypeAlias = str | Path | Checkpoint
"""What names a model: a folder, a GGUF file, a hub id, or an open checkpoint."""


def open_checkpoint(source: ModelSource, *, weights: bool = True) -> Checkpoint:
    """Finds a checkpoint, fetches it if it is on the hub, and reads its configuration.

    Args:
      source: a folder, a GGUF file, or a hub id such as "roberta-base" or "org/name"; an open checkpoint is returned
        as it is.
      weights: fetch the weights and the tokenizer from the hub too, not config.json alone.

    Raises:
      FileNotFoundError: there is no such folder or no config.json, and the hub cannot be reached or does not have it.
      ValueError: config.json does not hold a JSON object, or the GGUF file is damaged or of an unsupported model.

    >>> import json, tempfile
    >>> sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=1, num_attention_heads=3, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ...     checkpoint = open_checkpoint(folder)
    >>> checkpoint.family.architecture_of("causal-lm"), checkpoint.sizes.hidden_size
    ('LlamaForCausalLM', 6)
    """
    if isinstance(source, Checkpoint):
        return source
    place = checkpoint_source(source, weights)
    if is_gguf(place):
        packed = GGUFTensors(place)
        return Checkpoint(config=packed.config, where=str(place), name=str(source), source=place, packed=packed)
    file = place / "config.json"
    return Checkpoint(config=read_json(file), where=str(file), name=str(source), source=place)


def origin_of(model: HuggingFaceModel) -> Checkpoint:
    """The checkpoint that a model was loaded from, described by the model; nothing is read."""
    source = Path(model.folder) if model.folder else None
    return Checkpoint(config=model.config, where=model.folder or "config.json", name=model.name_or_path, source=source)


def checkpoint_source(path_or_id: str | Path, weights: bool = True) -> Path:
    """The local folder, or GGUF file, of a checkpoint; one that is not local is fetched from the hub into its cache.

    Only the configuration, safetensors and tokenizer files are fetched: nothing that could run code.

    Args:
      path_or_id: a folder, a GGUF file, or a hub id.
      weights: fetch the weights and the tokenizer too, not config.json alone.

    Raises:
      FileNotFoundError: there is no such folder, and the hub cannot be reached or does not have it.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir() or (folder.is_file() and is_gguf(folder)):
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file; give the folder that holds it and config.json, or a .gguf file")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path_or_id)) is not None
    if isinstance(path_or_id, Path) or not is_id or is_gguf(folder):
        raise FileNotFoundError(f"there is no folder {folder}; check its name, or give a hub id such as org/name")
    return _from_hub(path_or_id, ["config.json", *(_FURTHER_FILES if weights else ())])


def _from_hub(repo_id: str, names: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        fetched = snapshot_download(
            repo_id,
            allow_patterns=names,
            ignore_patterns=["*/*"],
        )
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{repo_id!r} is not a folder here and could not be fetched from the hub ({reason}); with a network run"
            f" `hf download {repo_id} --local-dir FOLDER`, bring FOLDER here and give its path"
        ) from error
    return Path(fetched)


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file.

    >>> is_gguf(Path("model.gguf")), is_gguf(Path("model"))
    (True, False)
    """
    return path.suffix.lower() == ".gguf"


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder's tokenizer; none where it has no tokenizer."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _stored(tensors: TensorFile | GGUFTensors, file: Path) -> dict[str, StoredTensor]:
    return {key: StoredTensor(file=file, shape=tensors.shape(key), dtype=tensors.dtype(key)) for key in tensors.keys()}


def _safetensors_in(folder: Path) -> dict[str, StoredTensor]:
    whole = folder / WEIGHTS
    if whole.is_file():
        with TensorFile(whole) as tensors:
            return _stored(tensors, whole)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    raise FileNotFoundError(_no_safetensors(folder))


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index} has no weight_map from tensors to files; fetch the checkpoint again")
    for name in named.values():
        _require_plain_name(name, index)
    listed = {tensor: folder / name for tensor, name in named.items()}
    held: dict[str, StoredTensor] = {}
    for path in sorted(set(listed.values())):
        with TensorFile(path) as tensors:
            found = _stored(tensors, path)
        if twice := sorted(set(found) & set(held)):
            raise ValueError(
                f"tensor {twice[0]} is in both {held[twice[0]].file} and {path}; fetch the checkpoint again"
            )
        held |= found
    for tensor in sorted(set(listed) | set(held)):
        there = held[tensor].file if tensor in held else None
        if listed.get(tensor) != there:
            raise ValueError(
                f"{index} puts tensor {tensor} in {_file_name(listed.get(tensor))}, it is in {_file_name(there)};"
                " fetch the checkpoint again"
            )
    return held


def _file_name(path: Path | None) -> str:
    return "no file" if path is None else path.name


def _require_plain_name(name: object, index: Path) -> None:
    # both flavours, so that an index written to attack one system is refused on the other as well
    plain = isinstance(name, str) and name == PurePosixPath(name).name == PureWindowsPath(name).name
    if not plain or not str(name).endswith(".safetensors"):
        raise ValueError(
            f"{index} names the file {name!r}; only a *.safetensors in the same folder is allowed,"
            " so do not trust this checkpoint"
        )


def _no_safetensors(folder: Path) -> str:
    present = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return (
            f"{folder} holds no {WEIGHTS}, only pickled weights ({pickled[0]}), and unpickling runs whatever code is in"
            " the file; if you trust it, convert it once with torch: transformers.AutoModelForSequenceClassification"
            ".from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and give NEW_FOLDER"
        )
    if "adapter_model.safetensors" in present:
        return f"{folder} holds an adapter, not a model; load its base model first, then the adapter with load_adapter"
    packed = [name for name in present if is_gguf(Path(name))]
    if packed:
        return f"{folder} holds no safetensors, but {packed[0]}; give the path of that file"
    others = [name for name in present if name.endswith(".safetensors")]
    found = f", only {', '.join(others[:3])}" if others else ""
    return f"{folder} holds neither {WEIGHTS} nor {INDEX}{found}; check the folder, or rename the file to {WEIGHTS}"
