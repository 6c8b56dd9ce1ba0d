"""Adapters from PEFT's format: LoRA as n=1 or, where it is block-diagonal, as MELoRA; and the authors' own files.

A folder that `write_peft` wrote comes back bit for bit, as long as its tensors are those it was written with.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors, config_of_sites
from melora_jax.checkpoints.factors import factors_from_plain, latents_of_minis, plain_factors, restored
from melora_jax.checkpoints.native_format import CONFIG_FILE, Facts, read_facts, require_finite
from melora_jax.checkpoints.peft.config import PeftSettings, read_settings
from melora_jax.checkpoints.peft.export import PEFT_TENSORS, PREFIX
from melora_jax.config import AdapterSpec
from melora_jax.files.safetensors_io import TensorFile
from melora_jax.files.torch_pickle import read_torch_archive
from melora_jax.models.hub.names import flax_from_torch

logger = logging.getLogger("melora_jax")

_PICKLED_TENSORS = "adapter_model.bin"
_FACTOR = re.compile(r"(?P<site>.+)\.lora_(?P<lookup>embedding_)?(?P<side>[AB])(\.(?P<mini>\d+|default))?(\.weight)?")
_MAGNITUDE = re.compile(r"(?P<site>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")


@dataclasses.dataclass
class _StoredSite:
    """The factors of one site as they lie in the file, by side ("A" or "B") and mini ("" where there are none)."""

    lookup: bool
    magnitude: np.ndarray | None = None
    factors: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)


def read_peft(folder: str | Path) -> AdapterTree:
    """Reads an adapter in PEFT's format, or in that of the authors' fork of PEFT.

    Args:
      folder: adapter_config.json with adapter_model.safetensors, or with an adapter_model.bin, which is read without
        running anything that is in it.

    Raises:
      FileNotFoundError: no such adapter folder.
      ValueError: settings that have no counterpart here, a tensor that is missing, surplus, misshapen or not finite, or
        a damaged file.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    file, tensors = _read_tensors(folder)
    sites, others = _sort_tensors(tensors, file)
    saved = _saved(others, settings, file)
    if (folder / CONFIG_FILE).is_file():
        facts = read_facts(folder / CONFIG_FILE)
        own = _as_exported(facts, sites, settings, file)
        if own is not None:
            return AdapterTree(facts.config, own, saved, facts.base_model, facts.task)
        logger.warning("%s is not what %s beside it describes: it was changed since; read as LoRA", file, CONFIG_FILE)
    found = {path: _site_factors(path, site, settings, file) for path, site in sites.items()}
    modules = [name for name in settings.modules_to_save if any(_is_in(name, path) for path in saved)]
    config = config_of_sites({path: site.spec for path, site in found.items()}, modules, settings.bias)
    return AdapterTree(config, found, saved, settings.base_model, settings.task)


def _extras(
    path: str, site: _StoredSite, lora_b: np.ndarray, settings: PeftSettings, file: Path
) -> dict[str, np.ndarray]:
    """DoRA's norms, there if and only if the config says so."""
    if (site.magnitude is not None) != settings.dora:
        there = "no" if site.magnitude is None else "a"
        raise ValueError(
            f"{file} has {there} lora_magnitude_vector of {path}, and adapter_config.json says "
            f"use_dora={settings.dora}; save the adapter again"
        )
    if site.magnitude is None:
        return {}
    if len(site.magnitude) != len(lora_b):
        raise ValueError(
            f"{file} has {len(site.magnitude)} norms of {path} for its {len(lora_b)} outputs; save the adapter again"
        )
    return {"magnitude": np.ascontiguousarray(site.magnitude)}


def _is_in(module: str, path: str) -> bool:
    """Whether a parameter at `path` lies in a module called `module`."""
    return f"/{module.replace('.', '/')}/" in f"/{path}"


def _saved(others: Mapping[str, np.ndarray], settings: PeftSettings, file: Path) -> dict[str, np.ndarray]:
    """What was trained beside the factors, by its path and in the layout of Flax."""
    saved: dict[str, np.ndarray] = {}
    for name, value in others.items():
        if name.endswith(".base_layer.weight"):
            logger.warning("%s holds the base's own %s, which is left out: the model's is used", file, name)
            continue
        path, array = flax_from_torch(name.replace(".base_layer.bias", ".bias"), value)
        trained_bias = settings.bias != "none" and name.endswith(".bias")
        if not trained_bias and not any(_is_in(module, path) for module in settings.modules_to_save):
            tie = [key for key in saved if key.endswith("embed_tokens/embedding") and settings.tied]
            if name == "lm_head.weight" and tie and np.array_equal(saved[tie[0]], value):
                continue  # the other end of a tie, which PEFT wants to see twice
            raise ValueError(f"{file}: {name} is neither a LoRA factor nor in modules_to_save; it has no place here")
        saved[path] = np.ascontiguousarray(array)
    for module in settings.modules_to_save:
        # PEFT lists both names that a classification head may have
        if module not in ("classifier", "score") and not any(_is_in(module, path) for path in saved):
            raise ValueError(f"{file} lacks {module}, which modules_to_save in adapter_config.json names")
    return saved


def _as_exported(
    facts: Facts, sites: Mapping[str, _StoredSite], settings: PeftSettings, file: Path
) -> dict[str, SiteFactors] | None:
    """The sites from which `write_peft` made this file; None if the file has changed since."""
    if facts.specs.keys() != sites.keys():
        return None
    own = {}
    for path, (spec, lookup) in facts.specs.items():
        lora_a, lora_b = _dense(path, sites[path], settings, file)
        plain = _without_padding(spec, lora_a.T, lora_b.T, settings.nblocks)
        if plain is None or len(plain[0]) % spec.n or plain[1].shape[1] % spec.n:
            return None
        left, right = plain
        rounding = facts.roundings.get(path)
        if rounding is None:
            a, b = factors_from_plain(spec, left, right, scaled=False)
        else:
            try:
                a, b = restored(spec, left, right, rounding)
            except ValueError as error:
                raise ValueError(f"{file.parent / CONFIG_FILE}: {error} at {path}; export the adapter again") from None
        own[path] = SiteFactors(spec, a, b, lookup, _extras(path, sites[path], lora_b, settings, file))
        again = plain_factors(own[path], scaled=rounding is not None)
        if not all(np.array_equal(one, other) for one, other in zip(again, (left, right), strict=True)):
            return None
    return own


def _without_padding(
    spec: AdapterSpec, left: np.ndarray, right: np.ndarray, nblocks: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """A site's latents without those that fill up its blocks to the widest site's; None where those are in use."""
    minis = (spec.rank,) if spec.mixer == "all" else spec.r
    if len(minis) % nblocks:
        return None
    width = left.shape[1] // nblocks
    used = [np.arange(width) < count for count in np.reshape(minis, (nblocks, -1)).sum(1)]
    kept = np.concatenate(used)
    if left[:, ~kept].any() or right[~kept].any() or kept.sum() != spec.rank:
        return None
    return left[:, kept], right[kept]


def _dense(path: str, site: _StoredSite, settings: PeftSettings, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """lora_A [rank d_in] and lora_B [d_out rank] of a site, block-diagonal storage undone."""
    if site.factors.keys() != {("A", ""), ("B", "")}:
        there = ", ".join(sorted(f"lora_{side}.{mini}".rstrip(".") for side, mini in site.factors))
        raise ValueError(f"{file} has {there} of {path} where one lora_A and one lora_B are expected")
    lora_a, lora_b = site.factors["A", ""], site.factors["B", ""]
    if settings.nblocks > 1:
        blocks = np.split(lora_a, settings.nblocks) if len(lora_a) % settings.nblocks == 0 else []
        lora_a = _block_diagonal(blocks) if blocks else lora_a
    if len(lora_a) != lora_b.shape[1]:
        shapes = f"{list(lora_a.shape)} and {list(lora_b.shape)}"
        raise ValueError(f"{file}: lora_A and lora_B of {path} have shapes {shapes}, which share no rank")
    return lora_a, lora_b


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    rows, columns = blocks[0].shape
    whole = np.zeros((len(blocks) * rows, len(blocks) * columns), blocks[0].dtype)
    for k, block in enumerate(blocks):
        whole[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns] = block
    return whole


def _site_factors(path: str, site: _StoredSite, settings: PeftSettings, file: Path) -> SiteFactors:
    """A site as minis: the authors' own, those of a block-diagonal LoRA, or one."""
    if settings.minis:
        return _authors_site(path, site, settings, file)
    lora_a, lora_b = _dense(path, site, settings, file)
    rank, alpha = settings.of_site(path)
    if len(lora_a) != rank:
        raise ValueError(f"{file}: lora_A of {path} has rank {len(lora_a)}, adapter_config.json says {rank}")
    minis = latents_of_minis(lora_a.T, lora_b.T)
    r = tuple(len(latents) for latents in minis)
    # the scale stays PEFT's where there are fewer latents, or fewer in a mini
    shares = (math.sqrt(sum(r) / rank),) * len(r) if settings.rslora else tuple(count / rank for count in r)
    scaling = "rslora" if settings.rslora else "mini"
    alphas = tuple(float(alpha * share) for share in shares)
    variant = "dora" if settings.dora else "plain"
    spec = AdapterSpec(n=len(r), r=r, alpha=alphas, dropout=settings.dropout, scaling=scaling, variant=variant)
    kept = np.concatenate(minis)
    a, b = factors_from_plain(spec, lora_a.T[:, kept], lora_b.T[kept], scaled=False)
    return SiteFactors(spec, a, b, site.lookup, _extras(path, site, lora_b, settings, file))


def _authors_site(path: str, site: _StoredSite, settings: PeftSettings, file: Path) -> SiteFactors:
    """A site of the authors' fork: lora_A.k [r_k i] and lora_B.k [o r_k] of each mini k."""
    r, alpha = zip(*settings.minis, strict=True)
    if site.factors.keys() != {(side, str(k)) for side in "AB" for k in range(len(r))}:
        raise ValueError(f"{file} lacks a mini's factor of {path}, or has one too many, for the {len(r)} of the config")
    spec = AdapterSpec(n=len(r), r=r, alpha=alpha, dropout=settings.dropout)
    pairs = [(site.factors["A", str(k)], site.factors["B", str(k)]) for k in range(len(r))]
    widths = {(lora_a.shape[1], len(lora_b)) for lora_a, lora_b in pairs}
    ranks = [(len(lora_a), lora_b.shape[1]) for lora_a, lora_b in pairs]
    if len(widths) > 1 or ranks != [(rank, rank) for rank in r]:
        shapes = [(list(lora_a.shape), list(lora_b.shape)) for lora_a, lora_b in pairs]
        raise ValueError(f"{file}: the factors of {path} have shapes {shapes}, which are not minis of rank {list(r)}")
    widest = max(r)
    a = np.stack([np.pad(lora_a.T, ((0, 0), (0, widest - len(lora_a)))) for lora_a, _ in pairs])
    b = np.stack([np.pad(lora_b.T, ((0, widest - lora_b.shape[1]), (0, 0))) for _, lora_b in pairs])
    return SiteFactors(spec, a, b, site.lookup)


def _read_tensors(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The file that holds the tensors, and them: without PEFT's prefix, floating and finite, as float32.

    Raises:
      FileNotFoundError: no such adapter folder.
      ValueError: a damaged file, or a tensor of another name or dtype, or that is not finite.
    """
    file = folder / PEFT_TENSORS
    if file.is_file():
        with TensorFile(file) as stored:
            tensors = {key: stored.read(key) for key in stored.keys()}
    elif (folder / _PICKLED_TENSORS).is_file():
        file = folder / _PICKLED_TENSORS
        tensors = read_torch_archive(file)
    else:
        raise FileNotFoundError(f"{folder} is not a PEFT adapter: it has neither {PEFT_TENSORS} nor {_PICKLED_TENSORS}")
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"{file}: {key} does not begin with {PREFIX!r}, as PEFT's names do; is it another's file?")
        if value.dtype.kind not in "fV" or value.dtype.itemsize > 4:  # bfloat16 is of kind V
            raise ValueError(f"{file}: {key} is {value.dtype}; convert it to float32, float16 or bfloat16 first")
    require_finite(tensors, file)
    return file, {key.removeprefix(PREFIX): value.astype(np.float32) for key, value in tensors.items()}


def _sort_tensors(
    tensors: Mapping[str, np.ndarray], file: Path
) -> tuple[dict[str, _StoredSite], dict[str, np.ndarray]]:
    """The tensors that are factors by their site's path, and the others by their name.

    Raises:
      ValueError: there are no factors, a factor occurs twice or is not a matrix, or norms have no factors.
    """
    sites: dict[str, _StoredSite] = {}
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
        site = sites.setdefault(path, _StoredSite(lookup=found["lookup"] is not None))
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
