"""What is checked on eight simulated devices, one line of JSON a check.

A program of its own, because the number of devices is set before jax starts::

    python tests/mesh_main.py FOLDER bert:2,2,2 llama:1,1,8 ... bytes:2,2,2

runs the models on the meshes, compares them with one device, and counts the bytes that layers and steps send.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import melora_jax as mj
from melora_jax.core.dropout import dropout_key, keep_mask
from melora_jax.files.safetensors_io import TensorFile
from melora_jax.models import abstract_model
from melora_jax.nn.parallel import KernelCut
from melora_jax.training import abstract_train_state, check_mesh
from tests.mesh.mesh_bytes import table
from tests.mesh.mesh_runs import HEADS, TASKS, WHOLE, Run, adapted, compare, distance, train, write_checkpoints
from tests.support import tiny_run
from train.config.run_config import from_toml
from train.loop.setup import prepare

DEVICES = 8


@functools.cache
def alone(folder: Path, family: str) -> Run:
    return train(folder, family, None)


def check_whole(folder: Path, family: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Full fine-tuning: every variable is trained. Adam would make steps of full size of gradients that are almost
    zero, so that after five steps entries are as far apart as the rounding of their gradients is large beside these."""
    changes = WHOLE | {"modules_to_save": {"bert": ["bert", "classifier"], "llama": ["model", "lm_head"]}[family]}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    run, other = (train(folder, family, where, tx=tx, **changes) for where in (mesh, None))
    return compare(run, other) | {"moved": distance(other.losses[0], other.losses[-1])}


def check_merged(folder: Path, family: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The strategy merged on the mesh, beside batched on one device."""
    strategies = {"merged": mesh, "batched": None}
    return compare(*(train(folder, family, where, strategy=name, dropout=0.0) for name, where in strategies.items()))


def check_quantized(folder: Path, qtype: str, family: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Training on a quantised base; codes must be the same, and cut like the kernels that they stand for."""
    model = adapted(folder, family, mesh, qtype)
    codes = [v for path, v in nnx.to_flat_state(nnx.state(model, mj.FrozenParam)) if path[-1] == "codes"]
    axes = {axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1}
    cut = [axes <= {name for name in code[...].sharding.spec if name} for code in codes]
    run = compare(train(folder, family, mesh, qtype=qtype), train(folder, family, None, qtype=qtype))
    return run | {"layers": len(cut), "cut": sum(cut)}


def check_planned(folder: Path, mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """Whether abstract shapes lie on an abstract mesh as the arrays do on the real one, optimizer state included."""
    equal = {}
    for name, family, qtype in (("bert", "bert", None), ("llama", "llama", None), ("nf4", "llama", "nf4")):
        model = adapted(folder, family, mesh, qtype)
        tx = mj.make_optimizer(model, 1e-3, head_learning_rate=1e-3)
        task, labels = TASKS[family]
        shapes = abstract_model(folder / family, task=task, num_labels=labels)
        config = model.melora_config

        def adapt(shapes: Any, qtype: Any = qtype, config: Any = config) -> Any:
            if qtype:
                mj.quantize(shapes, qtype)
            mj.adapt(shapes, config, rngs=nnx.Rngs(0))
            return shapes

        planned = abstract_train_state(nnx.eval_shape(adapt, shapes), tx, mesh.abstract_mesh)
        pairs = zip(jax.tree.leaves(planned), jax.tree.leaves(mj.train_state(model, tx)), strict=True)
        equal[name] = all(
            (ours.shape, ours.dtype, ours.sharding.shard_shape(ours.shape))
            == (real.shape, real.dtype, real.sharding.shard_shape(real.shape))
            for ours, real in pairs
        )
    return equal


def check_training(folder: Path, family: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    run = train(folder, family, mesh)
    with TensorFile(folder / family / "model.safetensors") as file:
        tensors = [file.read(key) for key in file.keys()]
    stored = {layout.tobytes() for tensor in tensors for layout in (tensor, tensor.T)}
    single = [layer for path, value in run.frozen.items() for layer in (value if "/block/" in path else [value])]
    as_stored = {value.tobytes() for value in single} <= stored
    cut = sum("tensor" in spec for spec in run.placed.values())
    return compare(run, alone(folder, family)) | {"as_stored": as_stored, "cut": cut}


def check_masks(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A mask drawn for rows over data and fsdp and features over tensor, against that of one device."""

    def draw(key: jax.Array) -> Any:
        with dropout_key(key):
            return keep_mask((16, 5, 48), 0.3, "layers/0/q_proj")

    where = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    mask, other = jax.jit(draw, out_shardings=where)(jax.random.key(7)), jax.jit(draw)(jax.random.key(7))
    return {"equal": bool(np.array_equal(mask, other)), "kept": float(np.mean(other))}


def check_guard(folder: Path, mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What the guard says of models as they are, and of one whose row-parallel products XLA is left to partition."""
    said = {}
    for family in ("bert", "llama"):
        said[family] = guarded(folder / family, family, mesh, *TASKS[family])
    said["a llama that classifies"] = guarded(folder / "llama", "llama", mesh, "sequence-classification", 3)
    ours, KernelCut.product = KernelCut.product, left_to_xla(KernelCut.product)
    said["left to XLA"] = guarded(folder / "llama", "llama", mesh, "causal-lm", None)
    KernelCut.product = ours
    return said


def check_refusals(folder: Path, mesh: jax.sharding.Mesh) -> dict[str, str]:
    """What is said of batches that don't share out, of a mesh that is too small, of adapters that need one device, and
    of minis that stay whole."""
    shared = tiny_run.SIZES | {"num_attention_heads": 2, "intermediate_size": 18}
    recipe, said = tiny_run.recipe(tiny_run.make_material(folder / "app", shared)), {}
    sizes = [word for name in mesh.axis_names for word in (f"--mesh.{name}", str(mesh.shape[name]))]
    refused = {key: [f"--train.{key}", "6"] for key in ("batch_size", "eval_batch_size")}
    refused["whole_factors"] = ["--mesh.whole_factors", "error", "--adapter.targets", "dense"]
    for key, words in refused.items():
        try:
            prepare(from_toml(recipe, [*sizes, *words]))
        except ValueError as error:
            said[key] = str(error)
    model = mj.from_pretrained(folder / "llama", task="causal-lm", mesh=mesh)
    try:
        model(np.ones((4, 3), np.int32))
    except ValueError as error:
        said["not in force"] = str(error)
    quantized = mj.from_pretrained(folder / "llama", task="causal-lm", mesh=mesh)
    mj.quantize(quantized, "int8")
    for key, base, n in (("merged", model, 3), ("merged int8", quantized, 4)):
        try:
            mj.adapt(base, mj.MELoRAConfig(n=n, targets=["q_proj"], strategy="merged"), rngs=nnx.Rngs(0))
        except ValueError as error:
            said[key] = str(error)
    for settings in ({"variant": "dora"}, {"variant": "adalora"}, {"init": "pissa"}):
        try:
            mj.adapt(model, mj.MELoRAConfig(n=2, r=2, targets=["q_proj"], **settings), rngs=nnx.Rngs(0))
        except ValueError as error:
            said[next(iter(settings.values()))] = str(error)
    config = mj.MELoRAConfig(n=8, targets=["q_proj", "v_proj", "o_proj"], n_pattern={"o_proj": 3, "v_proj": 4})
    said["whole"] = str(mj.adapt(model, config, rngs=nnx.Rngs(0))).partition("frozen\n")[2]
    return said


def guarded(path: Path, family: str, mesh: jax.sharding.Mesh, task: str, labels: int | None) -> str:
    targets = {"bert": ["query"], "llama": ["q_proj"]}[family]
    head = "score" if family == "llama" and labels else HEADS[family]
    config = mj.MELoRAConfig(n=8, targets=targets, layers=[0], modules_to_save=[head])
    try:
        check_mesh(path, config, mesh, task=task, num_labels=labels)
    except ValueError as error:
        return str(error)
    return "equal"


def left_to_xla(product: Any) -> Any:
    """A dense product whose row-parallel form asks for a cut result, which XLA computes wrongly on three axes."""

    def wrong(self: KernelCut, x: jax.Array, kernel: jax.Array, *rest: Any, **options: Any) -> jax.Array:
        if self.form(jax.sharding.get_abstract_mesh()) != "row":
            return product(self, x, kernel, *rest, **options)
        cut = jax.P(("data", "fsdp"), None, "tensor")
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, cut) @ kernel, cut)

    return wrong


def main(folder: Path, checks: list[str]) -> None:
    write_checkpoints(folder)
    for check in checks:
        what, _, sizes = check.partition(":")
        mesh = mj.make_mesh(*map(int, sizes.split(",")))
        if what == "bytes":
            result: dict[str, Any] = table(folder, mesh)
        elif what.startswith(("nf4-", "int8-")):
            result = check_quantized(folder, *what.split("-"), mesh)
        elif what.startswith("merged-"):
            result = check_merged(folder, what.removeprefix("merged-"), mesh)
        elif what.startswith("whole-"):
            result = check_whole(folder, what.removeprefix("whole-"), mesh)
        elif what == "planned":
            result = check_planned(folder, mesh)
        elif what == "masks":
            result = check_masks(mesh)
        elif what == "guard":
            result = check_guard(folder, mesh)
        else:
            result = check_refusals(folder, mesh) if what == "refusals" else check_training(folder, what, mesh)
        print(json.dumps({"check": check, **result}), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main(Path(sys.argv[1]), sys.argv[2:])
