"""The change of each parameter by a full fine-tuning, and the MELoRA nearest to it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from melora_jax.checkpoints.adapter_state import config_of_sites
from melora_jax.checkpoints.arithmetic import Approximation, compress_deltas
from melora_jax.config import is_suffix
from melora_jax.models import Checkpoint, open_checkpoint
from melora_jax.models.families import Family
from melora_jax.models.hub.names import flax_from_torch


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint and, by their canonical names, the keys of its tensors."""

    opened: Checkpoint
    task: str
    tensors: dict[str, str]

    @property
    def path(self) -> Path | None:
        return self.opened.source

    @property
    def family(self) -> Family:
        return self.opened.family

    def read(self, name: str) -> np.ndarray:
        return np.asarray(self.opened.read(self.tensors[name]), np.float32)


def _checkpoint(path_or_id: str | Path) -> _Checkpoint:
    opened = open_checkpoint(path_or_id)
    family = opened.family
    classifies = any(name.endswith("ForSequenceClassification") for name in opened.config.get("architectures") or ())
    task = "causal-lm" if family.is_decoder and not classifies else "sequence-classification"
    names, _ = family.sorted_out(opened.files, task, ())
    return _Checkpoint(opened, task, {name: key for key, name in names.items()})


def compress_difference(
    base: str | Path, tuned: str | Path, *, n: int, r: int, targets: Sequence[str] = ()
) -> Approximation:
    """The MELoRA of n minis of rank r nearest to what a full fine-tuning changed.

    Dense layers are compressed one at a time, a changed head is kept whole, and whatever else changed (norms, biases,
    embeddings) is named with the size of its change in the result's `left_out`.

    Args:
      base, tuned: folders or hub ids of the checkpoint before and after.
      n: minis a layer; it must divide both sizes of each.
      r: rank of one mini.
      targets: suffixes of the layers to compress; none takes every dense layer that changed.

    Raises:
      FileNotFoundError: a checkpoint does not exist.
      ValueError: the checkpoints differ in family or sizes, nothing changed, or n does not divide a layer.
    """
    before, after = _checkpoint(base), _checkpoint(tuned)
    if before.family != after.family:
        families = f"{before.family.model_type} and {after.family.model_type}"
        raise ValueError(
            f"{before.path} and {after.path} are of unlike families, {families}; compare a model with itself"
        )
    head: dict[str, np.ndarray] = {}
    left_out: dict[str, float] = {}
    deltas = _dense_changes(before, after, targets, head, left_out)
    first = next(deltas, None)
    if first is None:
        raise ValueError(f"no dense layer that targets={list(targets)} names differs between {base} and {tuned}")
    found = compress_deltas(itertools.chain([first], deltas), n=n, r=r)
    modules = [name for name in before.family.head if any(path.startswith(f"{name}/") for path in head)]
    specs = {path: site.spec for path, site in found.tree.sites.items()}
    tree = dataclasses.replace(
        found.tree,
        config=config_of_sites(specs, modules),
        saved=head,
        base_model=str(base),
        task=after.task,
    )
    return dataclasses.replace(found, tree=tree, left_out=left_out)


def _dense_changes(
    before: _Checkpoint,
    after: _Checkpoint,
    targets: Sequence[str],
    head: dict[str, np.ndarray],
    left_out: dict[str, float],
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, ΔW [d_in, d_out]) of each changed dense layer; a changed head and other changes go into the two dicts."""
    for name in sorted(after.tensors):
        path, value = flax_from_torch(name, after.read(name))
        if name.split(".")[0] in before.family.head:
            head[path] = np.ascontiguousarray(value)
            continue
        if name not in before.tensors:
            raise ValueError(f"{after.path} has {name}, which {before.path} lacks; compare a model with itself")
        old = flax_from_torch(name, before.read(name))[1]
        if old.shape != value.shape:
            shapes = f"{list(old.shape)} and {list(value.shape)}"
            raise ValueError(
                f"{path} has shapes {shapes} in {before.path} and {after.path}; compare a model with itself"
            )
        site, _, leaf = path.rpartition("/")
        # as with "all-linear", the layer that gives a language model's logits must be named
        named = any(is_suffix(target, site) for target in targets) or (not targets and site != "lm_head")
        if leaf == "kernel" and named:
            if not np.array_equal(old, value):
                yield site, value - old
        elif not np.array_equal(old, value):
            left_out[path] = float(np.sum((value.astype(np.float64) - old) ** 2))
