"""Adapters in PEFT's format: plain LoRA for every program that reads one, and block-diagonal LoRA for PEFT.

The folder::

    adapter_config.json          PEFT's settings and nothing else
    adapter_model.safetensors    "base_model.model.<module>.lora_A.weight" [rank d_in], ".lora_B.weight" [d_out rank]
    melora_config.json           what makes it MELoRA again, bit for bit
    README.md                    the model card
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from melora_jax.adapters.kinds import kind_of
from melora_jax.checkpoints.adapter_state import AdapterTree, SiteFactors
from melora_jax.checkpoints.factors import as_plain, plain_factors, rounding_of
from melora_jax.checkpoints.model_card import Provenance, write_card
from melora_jax.checkpoints.native_format import CONFIG_FILE, write_json
from melora_jax.checkpoints.peft.config import PEFT_CONFIG, PEFT_TASKS
from melora_jax.core.report import rank_note, served_rank
from melora_jax.files.atomic import atomic_folder
from melora_jax.files.safetensors_io import write_tensors

logger = logging.getLogger("melora_jax")

PeftFormat = Literal["lora", "bdlora"]
PEFT_TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftHost:
    """What an export must know of the model beside its adapter.

    Attributes:
      saved: what is trained beside its factors under PEFT's names and in the layout of torch.
      other_modules: paths of its modules that have no adapter. If one shares its last name with an adapted one,
        `target_modules` lists whole paths instead of names.
      tied: an embedding that is the output layer too is adapted or saved; PEFT is told to keep the two equal.
    """

    saved: Mapping[str, np.ndarray]
    other_modules: Collection[str] = ()
    tied: bool = False


def write_peft(
    tree: AdapterTree,
    host: PeftHost,
    folder: str | Path,
    format: PeftFormat = "lora",
    provenance: Provenance | None = None,
) -> Path:
    """Writes the adapter as LoRA: `"lora"` for what reads PEFT's format, `"bdlora"` for PEFT alone.

    Minis of `identity` and `shuffle` become factors of rank Σ r_k, those of `all` of rank r; narrower sites are padded
    with zeros. One scale shared by all is `lora_alpha / r`; else the scales go into B and `lora_alpha` equals `r`.
    With `"bdlora"` the blocks of A are stored without the zeros between them. AdaLoRA is written with the latents that
    it has left, PiSSA as the difference from its start, at twice the rank, and DoRA as PEFT's `use_dora`.

    Args:
      tree: the adapter.
      host: the model that it is of.
      folder: replaced as a whole or, on any error, not at all.
      format: `"lora"` or `"bdlora"`.
      provenance: where the adapter comes from, for the model card.

    Raises:
      ValueError: the adapter has no site, the format is unknown, or `"bdlora"` can't hold the adapter.
    """
    if format not in ("lora", "bdlora"):
        raise ValueError(f'format={format!r} is unknown; choose "lora" or "bdlora"')
    if not tree.sites:
        raise ValueError("there is no adapted layer to export, PEFT needs one; keep a head alone with save_adapter")
    own = kind_of(tree.config).peft_tensors
    if own and format == "bdlora":
        raise ValueError('format="bdlora" has no place for DoRA\'s norms; choose format="lora"')
    tree = tree if own else as_plain(tree, "PEFT's LoRA holds plain factors")
    shared = {scale for site in tree.sites.values() for scale in site.spec.scales}
    folded = len(shared) > 1
    plain = {path: plain_factors(site, scaled=folded) for path, site in tree.sites.items()}
    nblocks = _nblocks(tree) if format == "bdlora" else 1
    blocked = {path: _blocked(tree.sites[path], *factors, nblocks) for path, factors in plain.items()}
    width = max(len(block) for blocks in blocked.values() for block, _ in blocks)
    tensors = {
        key: value for path, blocks in blocked.items() for key, value in _tensors(path, tree, blocks, width).items()
    }
    tensors |= {
        f"{PREFIX}{path.replace('/', '.')}.{theirs}": site.extras[ours]
        for path, site in tree.sites.items()
        for ours, theirs in own.items()
    }
    tensors |= {PREFIX + name: np.ascontiguousarray(value) for name, value in host.saved.items()}
    rank = nblocks * width
    config = _peft_config(tree, host, rank, float(rank) if folded else shared.pop() * rank)
    if format == "bdlora":
        config["use_bdlora"] = _bdlora(config["target_modules"], nblocks)
    facts = tree.facts()
    if folded:
        facts["roundings"] = {path: rounding_of(site, *plain[path]) for path, site in tree.sites.items()}
    with atomic_folder(folder) as place:
        write_tensors(place / PEFT_TENSORS, tensors, {"format": "pt"})
        write_json(place / PEFT_CONFIG, config)
        write_json(place / CONFIG_FILE, facts)
        write_card(place, folder, tree, provenance or Provenance(), rank=rank, format=format)
    _say_rank(rank, format)
    return Path(folder)


def _nblocks(tree: AdapterTree) -> int:
    """How many blocks A of every site has: what divides each site's n, since PEFT knows one number for all."""
    for path, site in tree.sites.items():
        if site.lookup or site.spec.mixer in ("all", "scatter"):
            dense = f'mixer="{site.spec.mixer}", whose A is not block-diagonal'
            kind = "an embedding" if site.lookup else dense
            raise ValueError(f'format="bdlora" has no place for {path}: it is {kind}; choose format="lora"')
    nblocks = math.gcd(*(site.spec.n for site in tree.sites.values()))
    if nblocks == 1:
        counts = sorted({site.spec.n for site in tree.sites.values()})
        raise ValueError(f'format="bdlora" needs an n that divides those of all sites, {counts}; choose format="lora"')
    return nblocks


_Blocks = list[tuple[np.ndarray, np.ndarray]]


def _blocked(site: SiteFactors, left: np.ndarray, right: np.ndarray, nblocks: int) -> _Blocks:
    """Rows of A and of Bᵀ of each block: [rank, d_in / nblocks] and [rank, d_out]."""
    if nblocks == 1:
        return [(left.T, right)]
    block_of = np.repeat(np.arange(site.spec.n) * nblocks // site.spec.n, site.spec.r)
    slices = np.split(left, nblocks)
    return [(part[:, block_of == block].T, right[block_of == block]) for block, part in enumerate(slices)]


def _tensors(path: str, tree: AdapterTree, blocks: _Blocks, width: int) -> dict[str, np.ndarray]:
    """lora_A and lora_B of one site under PEFT's keys, each block padded to `width` latents."""
    padded = [[np.pad(rows, ((0, width - len(rows)), (0, 0))) for rows in block] for block in blocks]
    lora_a, lora_b = (np.concatenate(rows) for rows in zip(*padded, strict=True))
    stem = PREFIX + path.replace("/", ".")
    names = ("lora_embedding_A", "lora_embedding_B") if tree.sites[path].lookup else ("lora_A.weight", "lora_B.weight")
    return {
        f"{stem}.{name}": np.ascontiguousarray(value) for name, value in zip(names, (lora_a, lora_b.T), strict=True)
    }


def _peft_config(tree: AdapterTree, host: PeftHost, rank: int, alpha: float) -> dict[str, Any]:
    leaves = {path.rpartition("/")[2] for path in tree.sites}
    ambiguous = leaves & {path.rpartition("/")[2] for path in host.other_modules}
    targets = [path.replace("/", ".") for path in tree.sites] if ambiguous else sorted(leaves)
    saved = [name.replace("/", ".") for name in tree.config.modules_to_save]
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(tree),
        "base_model_name_or_path": tree.base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": tree.config.dropout,
        "target_modules": targets,
        "modules_to_save": saved or None,
        "bias": tree.config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        **kind_of(tree.config).peft_settings,
    }
    return config | ({"ensure_weight_tying": True} if host.tied else {})


def _task_type(tree: AdapterTree) -> str | None:
    """PEFT's name for the task; None for a classifier with an untrained head, which PEFT would look for in the file."""
    task = PEFT_TASKS.get(tree.task or "")
    has_head = any({"classifier", "score"} & set(path.split("/")) for path in tree.saved)
    return task if task != "SEQ_CLS" or has_head else None


def _bdlora(targets: list[str], nblocks: int) -> dict[str, Any]:
    return {"target_modules_bd_a": targets, "target_modules_bd_b": [], "nblocks": nblocks, "match_strict": True}


def _say_rank(rank: int, format: PeftFormat) -> None:
    if format == "bdlora":
        logger.info("exported at rank %d for PEFT; vLLM, SGLang and llama.cpp need format lora", rank)
        return
    level = logging.INFO if served_rank(rank) else logging.WARNING
    logger.log(level, "exported at rank %d%s %s", rank, ";" if served_rank(rank) else ",", rank_note(rank))
