"""Adapters as files: our own format, and PEFT's. Works on arrays by path; knows no modules.

Our folder::

    melora_config.json            the MELoRAConfig, the base model's name, every site's shape
    melora_adapter.safetensors    "<site>/a" [n i r], "<site>/b" [n r o], and the saved modules' parameters

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`, and our `melora_config.json` beside them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from melora_jax import blocks
from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.storage import TensorFile, atomic_folder, read_json, write_tensors

logger = logging.getLogger("melora_jax")

CONFIG_FILE = "melora_config.json"
TENSOR_FILE = "melora_adapter.safetensors"
FORMAT_VERSION = 1
# vLLM's largest --max-lora-rank, and the values it takes (vllm/config/lora.py, 0.32).
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclasses.dataclass(frozen=True)
class SiteFactors:
    """One site's adapter as arrays: a [n i r] and b [n r o]; `lookup` marks an embedding."""

    spec: AdapterSpec
    a: np.ndarray
    b: np.ndarray
    lookup: bool = False

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a and b."""
        return self.a.shape, self.b.shape


@dataclasses.dataclass(frozen=True)
class AdapterTree:
    """Everything an adapter file holds.

    Attributes:
      config: what the model was adapted with.
      sites: the factors by site path.
      saved: parameters of `modules_to_save` by path, in Flax's layout.
      base_model: name or folder of the base checkpoint, if known.
      task: the base model's task, if known.
    """

    config: MELoRAConfig
    sites: Mapping[str, SiteFactors]
    saved: Mapping[str, np.ndarray]
    base_model: str | None = None
    task: str | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """All arrays by their key in our file."""
        factors = {f"{path}/{name}": getattr(site, name) for path, site in self.sites.items() for name in ("a", "b")}
        return factors | dict(self.saved)

    def facts(self) -> dict[str, Any]:
        """The contents of our JSON file."""
        sites = {path: dataclasses.asdict(site.spec) | {"lookup": site.lookup} for path, site in self.sites.items()}
        return {
            "format": "melora_jax",
            "version": FORMAT_VERSION,
            "base_model": self.base_model,
            "task": self.task,
            "config": json.loads(self.config.to_json()),
            "sites": sites,
        }


def write_adapter(tree: AdapterTree, folder: str | Path) -> Path:
    """Writes our format, replacing `folder` as a whole or, on any error, not at all."""
    with atomic_folder(folder) as place:
        write_tensors(place / TENSOR_FILE, tree.tensors(), {"format": "melora_jax"})
        _write_json(place / CONFIG_FILE, tree.facts())
    return Path(folder)


def read_adapter(folder: str | Path) -> AdapterTree:
    """Reads our format.

    Raises:
      FileNotFoundError: no such adapter folder.
      ValueError: a file that is damaged, of another version, with a missing tensor, a wrong shape, or a value that is
        not finite.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no adapter folder: it has no {name}; save_adapter writes one")
    where = folder / CONFIG_FILE
    facts = read_json(where)
    found = facts.get("format"), facts.get("version")
    if found != ("melora_jax", FORMAT_VERSION):
        raise ValueError(
            f"{where} is of format {found[0]!r} version {found[1]!r}, this library reads 'melora_jax' version "
            f"{FORMAT_VERSION}; update melora_jax, or save the adapter again"
        )
    for key in ("config", "sites"):
        if not isinstance(facts.get(key), dict):
            raise ValueError(f'{where} has no object "{key}"; save the adapter again')
    tensors = _finite_tensors(folder / TENSOR_FILE)
    try:
        config = MELoRAConfig.from_json(json.dumps(facts["config"]))
        specs = {path: _spec_from(entry) for path, entry in facts["sites"].items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    sites = {
        path: SiteFactors(spec, *_factors(path, spec, tensors, folder / TENSOR_FILE), lookup=lookup)
        for path, (spec, lookup) in specs.items()
    }
    return AdapterTree(config, sites, tensors, facts.get("base_model"), facts.get("task"))


def _finite_tensors(file: Path) -> dict[str, np.ndarray]:
    with TensorFile(file) as stored:
        tensors = {key: stored.read(key) for key in stored.keys()}
    for key, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{file}: {key} has values that are not finite: training diverged; use an earlier adapter")
    return tensors


def _spec_from(entry: Any) -> tuple[AdapterSpec, bool]:
    """A site's spec and whether it is an embedding's, from their JSON form."""
    keys = {field.name for field in dataclasses.fields(AdapterSpec)} | {"lookup"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise ValueError(f"a site is {entry!r} where an object with the keys {sorted(keys)} is expected; save it again")
    if not isinstance(entry["r"], list) or not isinstance(entry["alpha"], list) or type(entry["lookup"]) is not bool:
        raise ValueError("a site's r and alpha must be lists and its lookup true or false; save the adapter again")
    values: dict[str, Any] = entry | {"r": tuple(entry["r"]), "alpha": tuple(entry["alpha"])}
    lookup = values.pop("lookup")
    return AdapterSpec(**values), lookup


def _factors(path: str, spec: AdapterSpec, tensors: dict[str, np.ndarray], file: Path) -> list[np.ndarray]:
    """Takes a site's a and b out of `tensors`, checked against its spec."""
    factors = []
    for name, axis in (("a", 2), ("b", 1)):
        key = f"{path}/{name}"
        if key not in tensors:
            raise ValueError(f"{file} lacks the tensor {key}, which {CONFIG_FILE} names; save the adapter again")
        value = tensors.pop(key)
        if value.ndim != 3 or (value.shape[0], value.shape[axis]) != (spec.n, max(spec.r)):
            raise ValueError(
                f"{file}: {key} has shape {list(value.shape)}, which is not n={spec.n} minis of rank {max(spec.r)}; "
                "save the adapter again"
            )
        factors.append(value)
    return factors


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_peft(
    tree: AdapterTree,
    saved: Mapping[str, np.ndarray],
    folder: str | Path,
    other_modules: Collection[str] = (),
    *,
    tied: bool = False,
) -> Path:
    """Writes the adapter as plain LoRA: what PEFT, vLLM, SGLang and llama.cpp's converter read.

    Minis of `identity` and `shuffle` become factors of rank Σ r_k, those of `all` of rank r; narrower sites are padded
    with zeros. One scale shared by all is `lora_alpha / r`; else the scales go into B and `lora_alpha` equals `r`.

    Args:
      tree: the adapter.
      saved: the parameters of its saved modules under their names and in the layout of torch.
      folder: replaced as a whole or, on any error, not at all.
      other_modules: paths of the model's modules that have no adapter. If one shares its last name with an adapted one,
        `target_modules` lists whole paths instead of names.
      tied: an embedding that is the output layer too is adapted or saved; PEFT is told to keep the two equal.

    Raises:
      ValueError: the adapter has no site.
    """
    if not tree.sites:
        raise ValueError("there is no adapted layer to export, PEFT needs one; keep a head alone with save_adapter")
    rank = max(site.spec.rank for site in tree.sites.values())
    shared = {scale for site in tree.sites.values() for scale in site.spec.scales}
    fold = len(shared) > 1 or any(site.spec.rank != rank for site in tree.sites.values())
    tensors: dict[str, np.ndarray] = {}
    for path, site in tree.sites.items():
        tensors |= _peft_factors(path, site, rank, fold)
    tensors |= {f"base_model.model.{name}": np.ascontiguousarray(value) for name, value in saved.items()}
    alpha = float(rank) if fold else shared.pop() * rank
    with atomic_folder(folder) as place:
        write_tensors(place / "adapter_model.safetensors", tensors, {"format": "pt"})
        config = _peft_config(tree, rank, alpha, other_modules) | ({"ensure_weight_tying": True} if tied else {})
        _write_json(place / "adapter_config.json", config)
        _write_json(place / CONFIG_FILE, tree.facts())
    _say_served_rank(rank)
    return Path(folder)


def _peft_factors(path: str, site: SiteFactors, rank: int, fold: bool) -> dict[str, np.ndarray]:
    """lora_A [rank d_in] and lora_B [d_out rank] of one site, under PEFT's keys."""
    scale = blocks.scale_of(site.spec)
    unscaled = (scale != 0).astype(np.float32)
    a, b = jnp.asarray(site.a), jnp.asarray(site.b)
    left, right = map(np.asarray, blocks.packed_factors(a, b, scale if fold else unscaled, site.spec.mixer))
    if len(set(site.spec.r)) > 1:  # only identity allows it: drop the padding of narrower minis
        used = scale.reshape(-1) != 0
        left, right = left[:, used], right[used]
    spare = rank - left.shape[1]
    lora_a = np.pad(left.T, ((0, spare), (0, 0)))
    lora_b = np.pad(right.T, ((0, 0), (0, spare)))
    stem = f"base_model.model.{path.replace('/', '.')}"
    names = ("lora_embedding_A", "lora_embedding_B") if site.lookup else ("lora_A.weight", "lora_B.weight")
    return {f"{stem}.{name}": np.ascontiguousarray(value) for name, value in zip(names, (lora_a, lora_b), strict=True)}


_PEFT_TASKS = {"sequence-classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


def _peft_config(tree: AdapterTree, rank: int, alpha: float, other_modules: Collection[str]) -> dict[str, Any]:
    leaves = {path.rpartition("/")[2] for path in tree.sites}
    ambiguous = leaves & {path.rpartition("/")[2] for path in other_modules}
    targets = [path.replace("/", ".") for path in tree.sites] if ambiguous else sorted(leaves)
    saved = [name.replace("/", ".") for name in tree.config.modules_to_save]
    return {
        "peft_type": "LORA",
        "task_type": _PEFT_TASKS.get(tree.task or ""),
        "base_model_name_or_path": tree.base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": tree.config.dropout,
        "target_modules": targets,
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _say_served_rank(rank: int) -> None:
    wide_enough = [served for served in SERVED_RANKS if served >= rank]
    if wide_enough:
        logger.info("exported at rank %d; vLLM serves it with --max-lora-rank %d", rank, wide_enough[0])
    else:
        limit = SERVED_RANKS[-1]
        logger.warning("exported at rank %d, above vLLM's limit of %d; merge the model to serve it there", rank, limit)
