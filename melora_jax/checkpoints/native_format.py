"""Our own adapter format on disk, for arrays by path.

Our folder::

    melora_config.json            the MELoRAConfig, the base model's name, every site's shape
    melora_adapter.safetensors    "<site>/a" [n i r], "<site>/b" [n r o], and the saved modules' parameters
    README.md                     the model card
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from melora_jax.checkpoints.adapter_state import FORMAT_VERSION, AdapterTree, SiteFactors, extra_shapes
from melora_jax.checkpoints.model_card import Provenance, write_card
from melora_jax.config import AdapterSpec, MELoRAConfig
from melora_jax.files.atomic import atomic_folder
from melora_jax.files.safetensors_io import TensorFile, read_json, write_tensors

CONFIG_FILE = "melora_config.json"
TENSOR_FILE = "melora_adapter.safetensors"


def write_adapter(tree: AdapterTree, folder: str | Path, provenance: Provenance | None = None) -> Path:
    """Writes our format. `folder` is replaced as a whole, or kept if writing fails.

    Args:
      tree: the adapter.
      folder: the folder.
      provenance: where the adapter comes from, for the model card.
    """
    with atomic_folder(folder) as place:
        write_tensors(place / TENSOR_FILE, tree.tensors(), {"format": "melora_jax"})
        write_json(place / CONFIG_FILE, tree.facts())
        write_card(place, folder, tree, provenance or Provenance())
    return Path(folder)


def read_adapter(folder: str | Path) -> AdapterTree:
    """Reads our format.

    Raises:
      FileNotFoundError: the folder holds no adapter.
      ValueError: a file is damaged or of another version, a tensor is missing or has a wrong shape, or a value is not
        finite.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {name}; save_adapter writes one")
    described = read_facts(folder / CONFIG_FILE)
    tensors = _finite_tensors(folder / TENSOR_FILE)
    sites = {
        path: _site_factors(path, spec, lookup, tensors, folder / TENSOR_FILE)
        for path, (spec, lookup) in described.specs.items()
    }
    return AdapterTree(described.config, sites, tensors, described.base_model, described.task)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What our JSON file says: the tree without its arrays.

    Attributes:
      config, base_model, task: as in `AdapterTree`.
      specs: each site's spec, and whether it is an embedding's.
      roundings: by site, what restores factors that an export has multiplied by their scales; see `plain.restored`.
    """

    config: MELoRAConfig
    specs: Mapping[str, tuple[AdapterSpec, bool]]
    base_model: str | None
    task: str | None
    roundings: Mapping[str, str]


def read_facts(where: Path) -> Facts:
    """Reads melora_config.json.

    Raises:
      ValueError: it is damaged or of another version, or lacks config or sites.
    """
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
    roundings = facts.get("roundings", {})
    if not isinstance(roundings, dict) or not all(isinstance(text, str) for text in roundings.values()):
        raise ValueError(f"{where} has roundings that are not text by site; export the adapter again")
    try:
        config = MELoRAConfig.from_json(json.dumps(facts["config"]))
        specs = {path: _spec_from(entry) for path, entry in facts["sites"].items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Facts(config, specs, facts.get("base_model"), facts.get("task"), roundings)


def _finite_tensors(file: Path) -> dict[str, np.ndarray]:
    with TensorFile(file) as stored:
        tensors = {key: stored.read(key) for key in stored.keys()}
    require_finite(tensors, file)
    return tensors


def require_finite(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    """Raises a ValueError if a tensor holds NaN or an infinity."""
    for key, value in tensors.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{file}: {key} has values that are not finite: training diverged; use an earlier adapter")


def _spec_from(entry: Any) -> tuple[AdapterSpec, bool]:
    """A site's spec and whether it is an embedding's, from their JSON form."""
    keys = {field.name for field in dataclasses.fields(AdapterSpec)} | {"lookup"}
    if isinstance(entry, dict):
        entry = {"variant": "plain"} | entry  # earlier versions knew no other
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise ValueError(f"a site is {entry!r} where an object with the keys {sorted(keys)} is expected; save it again")
    if not isinstance(entry["r"], list) or not isinstance(entry["alpha"], list) or type(entry["lookup"]) is not bool:
        raise ValueError("a site's r and alpha must be lists and its lookup true or false; save the adapter again")
    values: dict[str, Any] = entry | {"r": tuple(entry["r"]), "alpha": tuple(entry["alpha"])}
    lookup = values.pop("lookup")
    return AdapterSpec(**values), lookup


def _site_factors(
    path: str, spec: AdapterSpec, lookup: bool, tensors: dict[str, np.ndarray], file: Path
) -> SiteFactors:
    """Takes a site's arrays out of `tensors`, checked against its spec."""
    site = SiteFactors(spec, *_factors(path, spec, tensors, file), lookup=lookup)
    extras = {}
    for name, shape in extra_shapes(spec, site.d_in, site.d_out).items():
        extras[name] = _taken(f"{path}/{name}", tensors, file)
        if extras[name].shape != shape:
            raise ValueError(
                f"{file}: {path}/{name} has shape {list(extras[name].shape)}, and its adapter asks for {list(shape)}; "
                "save the adapter again"
            )
    return dataclasses.replace(site, extras=extras)


def _taken(key: str, tensors: dict[str, np.ndarray], file: Path) -> np.ndarray:
    if key not in tensors:
        raise ValueError(f"{file} lacks the tensor {key}, which {CONFIG_FILE} names; save the adapter again")
    return tensors.pop(key)


def _factors(path: str, spec: AdapterSpec, tensors: dict[str, np.ndarray], file: Path) -> list[np.ndarray]:
    """Takes a site's a and b out of `tensors`, checked against its spec."""
    factors = []
    for name, axis in (("a", 2), ("b", 1)):
        key = f"{path}/{name}"
        value = _taken(key, tensors, file)
        if value.ndim != 3 or (value.shape[0], value.shape[axis]) != (spec.n, max(spec.r)):
            raise ValueError(
                f"{file}: {key} has shape {list(value.shape)}, which is not n={spec.n} minis of rank {max(spec.r)}; "
                "save the adapter again"
            )
        factors.append(value)
    return factors


def write_json(path: Path, values: Any) -> None:
    """Writes JSON with an indent of 2 and a newline at the end."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
