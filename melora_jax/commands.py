"""Adapter folders and checkpoints turned into one another: what the commands do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from melora_jax.adapters.merge import merge
from melora_jax.checkpoints.adapter_state import AdapterTree
from melora_jax.checkpoints.arithmetic import Approximation, compress
from melora_jax.checkpoints.difference import compress_difference
from melora_jax.checkpoints.inspect import read_any
from melora_jax.checkpoints.native_format import TENSOR_FILE, write_adapter
from melora_jax.checkpoints.peft.export import PeftFormat, write_peft
from melora_jax.checkpoints.peft.reader import read_peft
from melora_jax.checkpoints.save_load import import_peft, load_adapter, peft_host, provenance_of
from melora_jax.models import Checkpoint, Model, abstract_model, from_pretrained, open_checkpoint, save_pretrained


def export_folder(adapter: str | Path, folder: str | Path, *, format: PeftFormat, base: str | None) -> Path:
    """Writes an adapter folder in PEFT's format; of the base only config.json is read.

    Raises:
      FileNotFoundError: no adapter, or no base.
      ValueError: damaged files, a base that is not named, or an adapter that the format can't hold.
    """
    tree = read_any(adapter)
    model = _without_values(tree, _base_of(tree, base, adapter))
    return write_peft(tree, peft_host(model, tree), folder, format, provenance_of(model))


def merge_folder(adapter: str | Path, folder: str | Path, *, base: str | None) -> Path:
    """Merges an adapter folder, ours or PEFT's, into its base and writes a Hugging Face checkpoint.

    Raises:
      FileNotFoundError: no adapter, or no base.
      ValueError: damaged files, a base that is not named or that the adapter is not for.
    """
    tree = read_any(adapter)
    model = _loaded(tree, _base_of(tree, base, adapter))
    put = load_adapter if (Path(adapter) / TENSOR_FILE).is_file() else import_peft
    put(model, adapter)
    save_pretrained(merge(model), folder)
    return Path(folder)


def import_folder(source: str | Path, folder: str | Path) -> Path:
    """Writes a PEFT adapter, or one of the authors', in our format; that it fits its base is checked on loading.

    Raises:
      FileNotFoundError: no adapter.
      ValueError: damaged files, or settings without counterpart.
    """
    return write_adapter(read_peft(source), folder)


def compress_folder(
    source: str | Path, folder: str | Path, *, n: int, r: int, base: str | None, targets: Sequence[str]
) -> Approximation:
    """Writes the MELoRA nearest to an adapter, or to what a fully fine-tuned checkpoint changed in its base.

    Raises:
      FileNotFoundError: neither adapter nor checkpoint there.
      ValueError: damaged files, unlike checkpoints, targets for an adapter, or n does not divide a layer.
    """
    if (Path(source) / "config.json").is_file():
        if base is None:
            raise ValueError(f"{source} is a whole model; say with --base what it was tuned from")
        found = compress_difference(base, source, n=n, r=r, targets=targets)
    elif targets:
        raise ValueError(f"{source} is an adapter, which is compressed as a whole; leave targets out")
    else:
        found = compress(read_any(source), n=n, r=r)
    write_adapter(found.tree, folder)
    return found


def _base_of(tree: AdapterTree, base: str | None, adapter: str | Path) -> str:
    if base is None and not tree.base_model:
        raise ValueError(f"{adapter} does not name its base model; give its folder or hub id with --base")
    return base or str(tree.base_model)


def _loaded(tree: AdapterTree, base: str) -> Model:
    checkpoint = open_checkpoint(base)
    stored = (checkpoint.config.get("dtype"), checkpoint.config.get("torch_dtype"))
    dtype = "bfloat16" if "bfloat16" in stored else "float32"
    task = _task(tree, checkpoint)
    return from_pretrained(checkpoint, task=task, num_labels=_labels(tree, task), dtype=dtype)


def _without_values(tree: AdapterTree, base: str) -> nnx.Module:
    checkpoint = open_checkpoint(base)
    task = _task(tree, checkpoint)
    model = abstract_model(checkpoint, task=task, num_labels=_labels(tree, task))
    model.folder = str(checkpoint.source)
    return model


def _task(tree: AdapterTree, checkpoint: Checkpoint) -> str:
    """The task that the adapter names, else the usual one of its base."""
    return tree.task or ("causal-lm" if checkpoint.family.is_decoder else "sequence-classification")


def _labels(tree: AdapterTree, task: str) -> int | None:
    """The outputs of the classification head that was trained beside the adapter; None where there is none."""
    last = ("classifier/bias", "classifier/out_proj/bias", "score/kernel")
    heads = [value for path, value in tree.saved.items() if path in last]
    return heads[0].shape[-1] if heads and task in ("sequence-classification", "regression") else None
