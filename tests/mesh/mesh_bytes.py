"""How many bytes cross `tensor` in layers and in a whole training step, with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import melora_jax as mj
from melora_jax.config import AdapterSpec
from melora_jax.core import blocks, initializers
from melora_jax.core.dropout import dropout_key
from melora_jax.core.products import latents
from melora_jax.nn.parallel import KernelCut, ParallelLinear
from melora_jax.nn.sharding import put
from tests.mesh.collectives import bytes_by_axes, over
from tests.mesh.mesh_runs import adapted, batch_of, loss

ROWS, TOKENS, D_IN, D_OUT = 8, 11, 48, 80
FORMS = {"column": (KernelCut(None, D_OUT), (None, "tensor")), "row": (KernelCut(D_IN, None), ("tensor", None))}
ADAPTERS = {"MELoRA n=8 r=1": (8, 1), "LoRA r=8": (1, 8)}


def layer_bytes(form: str, mesh: Mesh, n: int | None, r: int, **settings: Any) -> dict[str, int]:
    """A dense layer of ours, forward and backward, the input's gradient too; n=None is the base alone."""
    cut, axes = FORMS[form]
    linear = ParallelLinear(D_IN, D_OUT, rngs=nnx.Rngs(0))
    linear.cut = cut
    linear.kernel.set_value(put(linear.kernel[...], NamedSharding(mesh, PartitionSpec(*axes))))
    if n is None:
        model: Any = linear
        linear.kernel, linear.bias = nnx.Variable(linear.kernel[...]), nnx.Variable(linear.bias[...])
    else:
        model = nnx.Sequential(linear)
        config = mj.MELoRAConfig(n=n, r=r, targets="all-linear", **({"dropout": 0.25} | settings))
        mj.adapt(model, config, rngs=nnx.Rngs(0))
    graphdef, factors, rest = nnx.split(model, nnx.Param, ...)

    def value(factors: Any, x: jax.Array, rest: Any, key: jax.Array) -> jax.Array:
        with dropout_key(key):
            return (nnx.merge(graphdef, factors, rest)(x) ** 2).sum()

    return _sent(value, form, mesh, factors, rest)


def free_bytes(form: str, mesh: Mesh, n: int, r: int, strategy: Any) -> dict[str, int]:
    """The same sum written without a `shard_map` and left to the partitioner, kernel and factors placed alike."""
    _, axes = FORMS[form]
    spec = AdapterSpec(n=n, r=(r,) * n, alpha=(16.0,) * n)
    a, b = initializers.init_factors(jax.random.key(0), D_IN, D_OUT, spec)
    cut = PartitionSpec("tensor") if n % mesh.shape["tensor"] == 0 else PartitionSpec()
    factors = tuple(put(factor, NamedSharding(mesh, cut)) for factor in (a, b))
    kernel = put(np.ones((D_IN, D_OUT), np.float32), NamedSharding(mesh, PartitionSpec(*axes)))
    features = {"column": ("tensor", None), "row": (None, "tensor")}[form]

    def value(factors: Any, x: jax.Array, kernel: jax.Array, key: jax.Array) -> jax.Array:
        del key
        y = x @ kernel + latents.apply(x, *factors, blocks.scale_of(spec), strategy=strategy)
        batch = ("data", "fsdp")
        return (jax.lax.with_sharding_constraint(y, PartitionSpec(batch, None, features[0])) ** 2).sum()

    return _sent(value, form, mesh, factors, kernel)


def _sent(value: Any, form: str, mesh: Mesh, factors: Any, rest: Any) -> dict[str, int]:
    x = np.ones((ROWS, TOKENS, D_IN), np.float32)
    last = "tensor" if form == "row" else None
    x = put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, last)))
    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
        return bytes_by_axes(gradients.lower(factors, x, rest, jax.random.key(0)).compile(), mesh)


def step_bytes(folder: Path, mesh: Mesh, targets: Any, **changes: Any) -> dict[str, int]:
    """A whole training step of the decoder, whose embedding is trained too, so that gradients go all the way back."""
    settings = {"targets": targets, "layers": [0] if targets else None, "modules_to_save": ["embed_tokens"]}
    model = adapted(folder, "llama", mesh, **(settings | changes))
    tx = mj.make_optimizer(model, 1e-3)
    state, frozen = mj.train_state(model, tx)
    step = mj.make_train_step(model, tx, loss, mesh=mesh)
    return bytes_by_axes(step.lower(state, frozen, batch_of("llama", 0), jax.random.key(0)).compile(), mesh)


def table(folder: Path, mesh: Mesh) -> dict[str, dict[str, int]]:
    """Bytes over `tensor` of each form of layer and of a step: of the base, and what adapters add."""
    rows: dict[str, dict[str, int]] = {}
    for form in FORMS:
        base = over("tensor", layer_bytes(form, mesh, None, 0))
        row = {"base": base}
        row["MELoRA n=8 r=8 merged"] = (
            over("tensor", layer_bytes(form, mesh, 8, 8, strategy="merged", dropout=0)) - base
        )
        for name, (n, r) in ADAPTERS.items():
            row[name] = over("tensor", layer_bytes(form, mesh, n, r)) - base
            for strategy in ("batched", "packed"):
                row[f"{name} left to XLA, {strategy}"] = over("tensor", free_bytes(form, mesh, n, r, strategy)) - base
        rows[form] = row
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = over("tensor", step_bytes(folder, mesh, [], n_pattern={}))
    rows["step"] = {"base": base}
    for name, (n, r) in ADAPTERS.items():
        sent = step_bytes(folder, mesh, linears, n=n, r=r, n_pattern={"k_proj": min(n, 4), "v_proj": min(n, 4)})
        rows["step"][name] = over("tensor", sent) - base
    return rows
