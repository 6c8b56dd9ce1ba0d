"""Describes an adapter folder in our format, PEFT's or the authors': sites, ranks, norms, size and servers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from melora_jax.adapters.kinds import kind_of
from melora_jax.checkpoints.adapter_state import AdapterTree
from melora_jax.checkpoints.factors import plain_factors, plain_site
from melora_jax.checkpoints.native_format import TENSOR_FILE, read_adapter
from melora_jax.checkpoints.peft.config import PEFT_CONFIG
from melora_jax.checkpoints.peft.export import PEFT_TENSORS
from melora_jax.checkpoints.peft.reader import read_peft
from melora_jax.checkpoints.peft.servers import Reader, readers
from melora_jax.core.report import rank_note, table
from melora_jax.core.spectrum import effective_rank, numerical_rank, singular_values
from melora_jax.files.safetensors_io import TensorFile, read_json


@dataclasses.dataclass(frozen=True)
class SiteSummary:
    """One site: its sizes, its minis and properties of its trained ΔW.

    Attributes:
      rank: the number of singular values of ΔW that exceed rounding errors.
      effective_rank: exp of the entropy of the normalised singular values.
      norm, largest: the Frobenius norm of ΔW and its largest singular value.
    """

    path: str
    d_in: int
    d_out: int
    n: int
    r: tuple[int, ...]
    rank: int
    effective_rank: float
    norm: float
    largest: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect_adapter`. Prints as a table.

    Attributes:
      format: the format of the files.
      base_model, task: from the files, if they say so.
      parameters: the number of parameters in factors and `modules_to_save`.
      size: bytes of all files.
      saved: paths of the parameters of `modules_to_save`.
      sites: the adapted layers.
      readers: the servers that load the folder as it is.
    """

    folder: Path
    format: str
    base_model: str | None
    task: str | None
    parameters: int
    size: int
    saved: tuple[str, ...]
    sites: tuple[SiteSummary, ...]
    readers: tuple[Reader, ...]

    def __str__(self) -> str:
        head = f"{self.folder}: {self.format}, {self.parameters:,} parameters, {self.size:,} bytes"
        of = f"base {self.base_model or 'not named'}, task {self.task or 'not named'}"
        rows = [("site", "d_in", "d_out", "n", "r", "rank", "effective", "norm", "largest"), *map(_row, self.sites)]
        saved = [f"trained whole: {', '.join(self.saved)}"] if self.saved else []
        return "\n".join([head, of, table(rows), *saved, "served by", *(f"  {reader}" for reader in self.readers)])


def _row(site: SiteSummary) -> tuple[str, ...]:
    r = str(site.r[0]) if len(set(site.r)) == 1 else ",".join(map(str, site.r))
    sizes = (str(size) for size in (site.d_in, site.d_out, site.n, r, site.rank))
    return (site.path, *sizes, f"{site.effective_rank:.2f}", f"{site.norm:.4g}", f"{site.largest:.4g}")


def read_any(folder: str | Path) -> AdapterTree:
    """Reads an adapter folder: ours, PEFT's or the authors'.

    Raises:
      FileNotFoundError: the folder holds no adapter.
      ValueError: files are damaged, or a setting has no counterpart.
    """
    folder = Path(folder)
    if (folder / TENSOR_FILE).is_file():
        return read_adapter(folder)
    if (folder / PEFT_CONFIG).is_file():
        return read_peft(folder)
    raise FileNotFoundError(f"{folder} is not an adapter folder: it has neither {TENSOR_FILE} nor {PEFT_CONFIG}")


def inspect_adapter(folder: str | Path) -> Inspection:
    """Describes an adapter folder from its files, without the base model.

    Raises:
      FileNotFoundError: the folder holds no adapter.
      ValueError: files are damaged, or a setting has no counterpart.
    """
    folder = Path(folder)
    tree = read_any(folder)
    factors = sum(kind_of(site.spec).parameters(site.spec, site.d_in, site.d_out) for site in tree.sites.values())
    kind, served = _served(folder, tree)
    return Inspection(
        folder=folder,
        format=kind,
        base_model=tree.base_model,
        task=tree.task,
        parameters=factors + sum(value.size for value in tree.saved.values()),
        size=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        saved=tuple(tree.saved),
        sites=tuple(_summary(path, tree) for path in tree.sites),
        readers=served,
    )


def _summary(path: str, tree: AdapterTree) -> SiteSummary:
    site = tree.sites[path]
    values = singular_values(*plain_factors(plain_site(site)))  # of DoRA before its normalisation
    norm = float((values**2).sum() ** 0.5)
    rank, effective = numerical_rank(values), effective_rank(values)
    largest = float(values.max(initial=0.0))
    return SiteSummary(path, site.d_in, site.d_out, site.spec.n, site.spec.r, rank, effective, norm, largest)


def _served(folder: Path, tree: AdapterTree) -> tuple[str, tuple[Reader, ...]]:
    if (folder / TENSOR_FILE).is_file():
        rank = max((plain_site(site).spec.rank for site in tree.sites.values()), default=0)
        note = f"export it first: as plain LoRA of rank {rank}, {rank_note(rank)}" if rank else "it is a head alone"
        others = Reader("PEFT, vLLM, SGLang, llama.cpp", False, note)
        return "melora_jax's own format", (Reader("melora_jax", True, "by load_adapter"), others)
    config = read_json(folder / PEFT_CONFIG)
    shapes = {}
    if (folder / PEFT_TENSORS).is_file():
        with TensorFile(folder / PEFT_TENSORS) as file:
            shapes = {key: file.shape(key) for key in file.keys()}
    own = Reader("melora_jax", True, "by import_peft")
    kind = "PEFT format" if config["peft_type"] == "LORA" else "the MELoRA authors' format"
    return kind, (own, *readers(config, shapes))
