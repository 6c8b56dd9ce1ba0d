"""Where a checkpoint is: a local folder, a GGUF file or the Hugging Face hub, and which file holds which tensor."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from melora_jax.files.safetensors_io import TensorFile, read_json
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


def checkpoint_source(path_or_id: str | Path, weights: bool = True) -> Path:
    """The local folder, or GGUF file, of a checkpoint; one that is not local is fetched from the hub into its cache.

    Only the configuration, safetensors and tokenizer files are fetched: nothing that could run code.

    Args:
      path_or_id: a folder, a GGUF file, or a hub id such as "roberta-base" or "org/name".
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
            f"{repo_id!r} is no folder here and could not be fetched from the hub ({reason}); with a network run"
            f" `hf download {repo_id} --local-dir FOLDER`, bring FOLDER here and give its path"
        ) from error
    return Path(fetched)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file's, by its name.

    >>> is_gguf(Path("model.gguf")), is_gguf(Path("model"))
    (True, False)
    """
    return path.suffix.lower() == ".gguf"


def config_of(source: Path) -> tuple[dict[str, Any], str]:
    """The configuration of a checkpoint, and the file that it is in.

    Args:
      source: the checkpoint's folder, or its GGUF file.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: config.json is no JSON object, or the GGUF file is damaged or of an unsupported model.
    """
    if is_gguf(source):
        with GGUFTensors(source) as tensors:
            return tensors.config, str(source)
    return read_json(source / "config.json"), str(source / "config.json")


def open_tensors(file: Path) -> TensorFile | GGUFTensors:
    """The tensors of a safetensors or GGUF file, by their Hugging Face names; a context manager.

    Raises:
      ValueError: the file is damaged or not supported.
    """
    return GGUFTensors(file) if is_gguf(file) else TensorFile(file)


def tensor_files(source: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint: the GGUF file, `model.safetensors`, or the files its index names.

    Args:
      source: the checkpoint's folder, or its GGUF file.

    Raises:
      FileNotFoundError: there are no safetensors, or a file the index names is missing.
      ValueError: a file is damaged, the index names a file outside the folder, or it contradicts the files.
    """
    whole = source if is_gguf(source) else source / WEIGHTS
    if whole.is_file():
        with open_tensors(whole) as file:
            return dict.fromkeys(file.keys(), whole)
    if (source / INDEX).is_file():
        return _indexed(source)
    raise FileNotFoundError(_no_safetensors(source))


def _indexed(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index} has no weight_map from tensors to files; fetch the checkpoint again")
    for name in named.values():
        _require_plain_name(name, index)
    listed = {tensor: folder / name for tensor, name in named.items()}
    held: dict[str, Path] = {}
    for path in sorted(set(listed.values())):
        with TensorFile(path) as file:
            for tensor in file.keys():
                if tensor in held:
                    raise ValueError(
                        f"tensor {tensor} is in both {held[tensor]} and {path}; fetch the checkpoint again"
                    )
                held[tensor] = path
    for tensor in sorted(set(listed) | set(held)):
        if listed.get(tensor) != held.get(tensor):
            raise ValueError(
                f"{index} puts tensor {tensor} in {_file_name(listed.get(tensor))}, it is in"
                f" {_file_name(held.get(tensor))}; fetch the checkpoint again"
            )
    return held


def _file_name(path: Path | None) -> str:
    return "no file" if path is None else path.name


def _require_plain_name(name: object, index: Path) -> None:
    # both flavours, so that an index written to attack one system is refused on the other too
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
            " the file; where you trust it, convert it once with torch: transformers.AutoModelForSequenceClassification"
            ".from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and give NEW_FOLDER"
        )
    if "adapter_model.safetensors" in present:
        return f"{folder} holds an adapter and no model; load its base model first, then the adapter with load_adapter"
    packed = [name for name in present if is_gguf(Path(name))]
    if packed:
        return f"{folder} holds no safetensors, but {packed[0]}; give the path of that file"
    others = [name for name in present if name.endswith(".safetensors")]
    found = f", only {', '.join(others[:3])}" if others else ""
    return f"{folder} holds neither {WEIGHTS} nor {INDEX}{found}; check the folder, or rename the file to {WEIGHTS}"
