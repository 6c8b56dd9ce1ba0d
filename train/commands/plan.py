"""`python -m train plan`: whether a run fits into the memory of its devices, from shapes alone.

Neither weights nor an accelerator are needed, and of the model only its config.json: the training step is traced on
abstract arrays, and `liveness` says what it holds at its fullest moment.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from train.config.run_config import RunConfig, from_toml
from train.lab.memory.devices import GIB, Devices, devices_from_name
from train.lab.memory.planning import Plan, abstract_mesh, plan_run
from train.report.tables import terminal_table

SHAPES = Path(__file__).parents[1] / "lab" / "memory" / "shapes"
_UNDONE = "XLA keeps on CPU what remat and quantisation would have made again, so there it takes more than this"


@dataclasses.dataclass(frozen=True)
class Options:
    """Say whether a run fits into memory. Further options are those of `run`."""

    recipe: Annotated[str, tyro.conf.Positional]
    """The run's recipe; of its model, config.json is enough."""
    device: tuple[str, ...]
    """What it is to run on: v5e-8, v5p-8, h100x8, cpu ...; several are compared."""
    data: int = 1
    """Devices on the mesh axis data."""
    tensor: int = 1
    """Devices on the mesh axis tensor; all others are on fsdp."""
    shapes: tuple[str, ...] = ()
    """Models in place of the recipe's, whose shapes are known here: llama-2-7b, llama-3-8b, llama-3-70b,
    roberta-base."""


def plan(words: Sequence[str]) -> int:
    """Prints the plan; the exit code is 0 if each run fits on each of the devices, else 1."""
    options, overrides = tyro.cli(
        Options, args=list(words), prog="python -m train plan", return_unknown_args=True, use_underscores=True
    )
    config = from_toml(options.recipe, overrides)
    kinds = [devices_from_name(name) for name in options.device]
    meshes = [_mesh(devices, options) for devices in kinds]
    models = [_of_shape(config, shape) for shape in options.shapes] or [config]
    return max([_say(model, options.device, kinds, meshes) for model in models])


def _of_shape(config: RunConfig, shape: str) -> RunConfig:
    """The same run of a model whose shapes are known here."""
    known = sorted(path.name for path in SHAPES.iterdir())
    if shape not in known:
        raise ValueError(f"no shapes are known here of {shape!r}; choose from {', '.join(known)}, or give --model.name")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(SHAPES / shape)))


def _say(config: RunConfig, names: Sequence[str], kinds: Sequence[Devices], meshes: Sequence[AbstractMesh]) -> int:
    kept = functools.cache(lambda mesh, cpu: plan_run(config, mesh, cpu=cpu))
    plans = [kept(mesh, devices.kind == "cpu") for mesh, devices in zip(meshes, kinds, strict=True)]
    console = Console()
    console.print(_describe(config), highlight=False, soft_wrap=True)
    console.print(_table(names, kinds, plans))
    fits = True
    for name, devices, found in zip(names, kinds, plans, strict=True):
        if devices.kind == "cpu" and (config.model.remat != "none" or config.model.quantize):
            console.print(f"{name}: {_UNDONE}", highlight=False, soft_wrap=True)
        if found.total > devices.usable:
            fits = False
            console.print(
                f"{name}: does not fit; {'; or '.join(_remedies(config, found))}", highlight=False, soft_wrap=True
            )
    return 0 if fits else 1


def _mesh(devices: Devices, options: Options) -> AbstractMesh:
    if options.data < 1 or options.tensor < 1 or devices.count % (options.data * options.tensor):
        raise ValueError(
            f"--data {options.data} and --tensor {options.tensor} do not divide {devices.count} x {devices.kind}; "
            "their product must"
        )
    return abstract_mesh(options.data, devices.count // (options.data * options.tensor), options.tensor)


def _describe(config: RunConfig) -> str:
    parts = f" in {config.train.accumulate} parts" if config.train.accumulate > 1 else ""
    rows = f"{config.train.batch_size} rows of {config.data.max_length} tokens a step{parts}"
    name = Path(config.model.name).name if Path(config.model.name).parent == SHAPES else config.model.name
    return f"{name}, {config.model.dtype}, remat {config.model.remat}, {rows}"


def _table(names: Sequence[str], kinds: Sequence[Devices], plans: Sequence[Plan]) -> Table:
    parts = [field.name for field in dataclasses.fields(Plan)]
    rows = [(part, *(f"{getattr(found, part) / GIB:.3f}" for found in plans)) for part in [*parts, "total"]]
    rows.append(("usable", *(f"{devices.usable / GIB:.1f}" for devices in kinds)))
    verdicts = (found.total <= devices.usable for found, devices in zip(plans, kinds, strict=True))
    rows.append(("fits", *("yes" if fits else "no" for fits in verdicts)))
    return terminal_table(("GiB a device", *names), rows)


def _remedies(config: RunConfig, found: Plan) -> list[str]:
    """What to change, the largest part of the memory first."""
    remedies = []
    if config.model.dtype == "float32":
        remedies.append("halve base and activations with --model.dtype bfloat16")
    if config.model.quantize is None:
        remedies.append("hold the base in 4 bits with --model.quantize nf4")
    if config.model.task == "causal-lm" and config.model.remat != "full":
        remedies.append("keep only each layer's input with --model.remat full")
    if config.train.batch_size > config.train.accumulate:
        remedies.append("take fewer rows at once with a larger --train.accumulate")
    shard = "take more devices, over which fsdp divides the base"
    return [shard, *remedies] if found.base > found.activations else [*remedies, shard]
