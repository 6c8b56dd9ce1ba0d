"""Whether a mesh computes what one device does: before a run, a small twin of the model takes one step on both.

XLA's partitioner can silently compute wrong products. The twin has the model's own layer sizes and adapters, but fewer
layers and a smaller vocabulary; it runs on the mesh that training will use.
"""

from __future__ import annotations

import contextvars
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from melora_jax.adapters.adapt import adapt
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import FrozenParam, MELoRAParam
from melora_jax.adapters.plan import plan_sites
from melora_jax.config import MELoRAConfig
from melora_jax.models import Checkpoint, ModelSource, abstract_model, model_from_config, open_checkpoint
from melora_jax.models.decoders.config import DecoderConfig
from melora_jax.models.hub.placement import place_model
from melora_jax.nn.sharding import AXES, DATA, FSDP, TENSOR, batch_sharding, put
from melora_jax.nn.tree import path_of, rewrite, walk

# Of the largest entry. In float32, another order of summation changes about 1e-6 of it; a wrong product about all.
TOLERANCE = 1e-3
_TOKENS = 8
_seen: contextvars.ContextVar[dict[str, jax.Array] | None] = contextvars.ContextVar("melora_guard", default=None)


def check_mesh(
    path_or_id: ModelSource,
    config: MELoRAConfig,
    mesh: Mesh,
    *,
    task: str = "sequence-classification",
    num_labels: int | None = None,
) -> None:
    """Compares the loss and gradients of a small adapted twin of a model on `mesh` with those on one device.

    The twin has the checkpoint's configuration with the fewest layers that include each layer type, a small vocabulary
    and random float32 weights. Only the checkpoint's configuration is read.

    Args:
      path_or_id, task, num_labels: as for `from_pretrained`.
      config: the adapters that the model will get.
      mesh: from `make_mesh`.

    Raises:
      ValueError: the two differ by more than rounding; the message names the first layer whose output does.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from melora_jax.nn.sharding import make_mesh
    >>> sizes = dict(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
    ...              max_position_embeddings=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    ...     check_mesh(folder, MELoRAConfig(n=2, targets=["query"]), make_mesh(data=-1))
    """
    checkpoint = open_checkpoint(path_or_id)
    full = abstract_model(checkpoint, task=task, num_labels=num_labels)
    small = _small(checkpoint, mesh)
    alone, placed = (
        model_from_config(small, task=task, num_labels=num_labels, where=checkpoint.where) for _ in range(2)
    )
    place_model(placed, mesh)
    for twin in (alone, placed):
        adapt(twin, _twin_config(config, full, twin), rngs=nnx.Rngs(0))
        _stir(twin)
    rows = 2 * mesh.shape[DATA] * mesh.shape[FSDP]
    ids = np.random.default_rng(0).integers(0, small["vocab_size"], (rows, min(_TOKENS, alone.max_length)))
    require_equal_on(mesh, alone, placed, ids.astype(np.int32))


def _small(checkpoint: Checkpoint, mesh: Mesh) -> dict[str, Any]:
    """The configuration with few layers and a small vocabulary; `tensor` divides it if it divides the real one."""
    sizes, small = checkpoint.sizes, dict(checkpoint.config)
    tensor = mesh.shape[TENSOR]
    small["vocab_size"] = min(sizes.vocab_size, 64 * tensor + (1 if sizes.vocab_size % tensor else 0))
    kinds = sizes.layer_types if isinstance(sizes, DecoderConfig) else ("layer",)
    layers = 1 + max(kinds.index(kind) for kind in set(kinds))
    small["n_layers" if "n_layers" in small else "num_hidden_layers"] = layers
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][:layers]
    return small


def _twin_config(config: MELoRAConfig, full: nnx.Module, twin: nnx.Module) -> MELoRAConfig:
    """A config that gives each layer of the twin the adapters of the layers of its kind in `full`."""
    specs = {_template(path): spec for path, spec in plan_sites(full, config).sites.items()}
    sites = {path_of(path): node for path, node in walk(twin) if isinstance(node, nnx.Module)}
    found = {re.escape(path): specs[_template(path)] for path in sites if _template(path) in specs}
    return dataclasses.replace(
        config,
        layers=None,
        exclude=(),
        targets="|".join(found) if found else (),
        n_pattern={path: spec.n for path, spec in found.items()},
        rank_pattern={path: spec.r for path, spec in found.items()},
        alpha_pattern={path: spec.alpha for path, spec in found.items()},
    )


def _template(path: str) -> str:
    return re.sub(r"(^|/)\d+(?=/|$)", r"\1*", path)


def _stir(model: nnx.Module) -> None:
    """Makes all factors nonzero, equally in every twin."""
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, MELoRAParam)):
        drawn = 0.1 * rng.standard_normal(variable.shape).astype(np.float32)
        placed = variable[...].sharding
        variable.set_value(put(drawn, placed) if isinstance(placed, NamedSharding) else jnp.asarray(drawn))


def require_equal_on(mesh: Mesh, alone: nnx.Module, placed: nnx.Module, ids: np.ndarray) -> None:
    """Compares the losses and gradients of two copies of a model.

    Args:
      mesh: the mesh that `placed` lies on.
      alone: the copy on one device.
      placed: the copy on the mesh.
      ids: token ids for both, int32 `[b, t]`.

    Raises:
      ValueError: they differ by more than rounding.
    """
    found = _distances(_step(alone, ids, None), _step(placed, ids, mesh))
    worst = max(found, key=lambda path: found[path])
    if found[worst] <= TOLERANCE:
        return
    outputs = _distances(_outputs(alone, ids, None), _outputs(placed, ids, mesh))
    layer = next((path for path, distance in outputs.items() if distance > TOLERANCE), worst)
    sizes = ", ".join(f"{name}={mesh.shape[name]}" for name in AXES)
    raise ValueError(
        f"on a mesh of {sizes} {layer} gives other values than on one device (relative difference "
        f"{outputs.get(layer, found[worst]):.1e}): this version of XLA partitions it wrongly; choose a mesh with an "
        "axis of size 1, or another version of jax"
    )


def _step(model: nnx.Module, ids: np.ndarray, mesh: Mesh | None) -> dict[str, np.ndarray]:
    """The loss and the gradients by path."""
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)

    def loss(trainable: nnx.State, rest: nnx.State, ids: jax.Array) -> jax.Array:
        return jnp.square(_call(nnx.merge(graphdef, trainable, rest, copy=True), ids)).mean()

    value, gradients = _run(jax.value_and_grad(loss), (trainable, rest), ids, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return {"the loss": value} | {path_of(path): gradient for path, gradient in leaves}


def _outputs(model: nnx.Module, ids: np.ndarray, mesh: Mesh | None) -> dict[str, np.ndarray]:
    """The output of each dense layer, by its path, in the order of the forward pass."""
    tapped = rewrite(nnx.clone(model), lambda path, node: _Tap(node, path_of(path)) if _is_dense(node) else node)
    graphdef, state, rest = nnx.split(tapped, FrozenParam, ...)

    def run(state: nnx.State, rest: nnx.State, ids: jax.Array) -> list[jax.Array]:
        token = _seen.set({})
        try:
            _call(nnx.merge(graphdef, state, rest, copy=True), ids)
            outputs = _seen.get() or {}
        finally:
            _seen.reset(token)
        names.extend(outputs)
        return list(outputs.values())

    names: list[str] = []
    outputs = _run(run, (state, rest), ids, mesh)
    return dict(zip(names, outputs, strict=True))


def _run(function: Any, states: tuple[Any, Any], ids: np.ndarray, mesh: Mesh | None) -> Any:
    """`function(*states, ids)`, at full precision, with its results on the host."""
    with jax.default_matmul_precision("highest"):
        if mesh is None:
            return jax.tree.map(np.asarray, jax.jit(function)(*states, ids))
        compiled = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))
        with jax.set_mesh(mesh):
            return jax.tree.map(np.asarray, compiled(*states, put(ids, batch_sharding(mesh))))


def _call(model: Any, ids: jax.Array) -> jax.Array:
    return model(ids).astype(jnp.float32)


def _is_dense(node: Any) -> bool:
    return isinstance(node, MELoRADense | nnx.Linear)


class _Tap(nnx.Module):
    """A layer whose output `_outputs` records while it traces."""

    def __init__(self, layer: Any, path: str) -> None:
        self.layer = layer
        self.path = path

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.layer(x)
        seen = _seen.get()
        if seen is not None:
            seen[self.path] = y
        return y


def _distances(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each array over its largest magnitude; infinite for NaN."""
    found = {}
    for path, value in one.items():
        distance = np.abs(np.float64(value) - other[path]).max(initial=0) / max(np.abs(value).max(initial=0), 1e-12)
        found[path] = float(np.nan_to_num(distance, nan=np.inf))
    return found
