"""The model card of an adapter folder: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from melora_jax.checkpoints.adapter_state import AdapterTree
from melora_jax.config import MELoRAConfig

CARD_FILE = "README.md"
_MARK = "<!-- written by melora_jax; a card without this line is kept as it is -->"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of an adapter, as far as it is known.

    Attributes:
      scores: measured values by name.
      data: the name or a description of the training data.
      license: the base model's licence.
    """

    scores: Mapping[str, float] | None = None
    data: str | None = None
    license: str | None = None


def write_card(
    place: Path,
    folder: str | Path,
    tree: AdapterTree,
    provenance: Provenance,
    *,
    rank: int | None = None,
    format: str | None = None,
) -> None:
    """Writes README.md into `place`, or copies the one in `folder` if a person wrote it.

    Args:
      place: the folder to write into.
      folder: the folder that `place` will replace.
      tree: the adapter.
      provenance: the adapter's origin.
      rank, format: of an export in PEFT's format; None for our own format.
    """
    theirs = Path(folder).expanduser() / CARD_FILE
    if theirs.is_file() and _MARK not in theirs.read_text(encoding="utf-8", errors="replace"):
        shutil.copyfile(theirs, place / CARD_FILE)
        return
    text = card_text(tree, provenance, rank=rank, format=format)
    (place / CARD_FILE).write_text(text, encoding="utf-8")


def card_text(tree: AdapterTree, provenance: Provenance, *, rank: int | None = None, format: str | None = None) -> str:
    """The card: metadata, base model, settings, sites and scores, as far as they are known."""
    from huggingface_hub import ModelCardData

    base, scores = tree.base_model, provenance.scores
    library = "peft" if format else "melora_jax"
    metadata = ModelCardData(base_model=base, library_name=library, license=provenance.license, tags=["melora", "lora"])
    lines = ["---", metadata.to_yaml(), "---", _MARK, "", f"# MELoRA adapter{f' for {base}' if base else ''}", ""]
    lines += [f"Task: {tree.task}.", ""] if tree.task else []
    lines += [f"Trained on {provenance.data}.", ""] if provenance.data else []
    if format:
        lines += [f"PEFT format `{format}`, rank {rank}: `PeftModel.from_pretrained(base, folder)` loads it.", ""]
    else:
        lines += ["`melora_jax.load_adapter(model, folder)` loads it.", ""]
    lines += ["| setting | value |", "|---|---|", *(f"| {key} | `{value}` |" for key, value in _settings(tree.config))]
    lines += ["", "| site | shape | n | r | alpha |", "|---|---|---:|---|---|", *_site_rows(tree)]
    if tree.saved:
        lines += ["", "Trained whole: " + ", ".join(f"`{path}`" for path in tree.saved) + "."]
    if scores:
        lines += ["", "| score | value |", "|---|---:|", *(f"| {name} | {value:g} |" for name, value in scores.items())]
    return "\n".join(lines) + "\n"


def _settings(config: MELoRAConfig) -> list[tuple[str, Any]]:
    """The settings that differ from their defaults, and the shape."""
    values, usual = json.loads(config.to_json()), json.loads(MELoRAConfig(targets="all-linear").to_json())
    shown = ("n", "r", "alpha", "targets")
    return [(key, value) for key, value in values.items() if key in shown or value != usual[key]]


def _site_rows(tree: AdapterTree) -> list[str]:
    rows = []
    for path, site in tree.sites.items():
        r, alpha = (", ".join(f"{value:g}" for value in _short(values)) for values in (site.spec.r, site.spec.alpha))
        rows.append(f"| `{path}` | {site.d_in} × {site.d_out} | {site.spec.n} | {r} | {alpha} |")
    return rows


def _short(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values[:1] if len(set(values)) == 1 else values


def license_in(folder: str | Path) -> str | None:
    """The licence in the metadata of a checkpoint's card; None if there is no card or it names none.

    >>> license_in("no/such/folder") is None
    True
    """
    from huggingface_hub.repocard import metadata_load

    card = Path(folder) / CARD_FILE
    if not str(folder) or not card.is_file():
        return None
    try:
        named = (metadata_load(card) or {}).get("license")
    except Exception:  # whatever the YAML of somebody else's card is damaged by: it names no licence
        return None
    return named if isinstance(named, str) and re.fullmatch(r"[\w.+-]+", named) else None
