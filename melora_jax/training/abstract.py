"""The start of training with shapes in place of arrays, and where they would lie on a mesh that need not exist."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.params import FrozenParam
from melora_jax.adapters.tensor_parallel import factor_spec
from melora_jax.nn.sharding import shardings_like
from melora_jax.nn.tree import path_of, walk
from melora_jax.training.optimizer import TrainState


def abstract_train_state(
    model: Any, tx: optax.GradientTransformation, mesh: Mesh | AbstractMesh | None = None
) -> tuple[TrainState, nnx.State]:
    """`train_state` of an abstract model: (state, frozen) of `jax.ShapeDtypeStruct`.

    Args:
      model: from `abstract_model`, adapted or not (`nnx.eval_shape` runs `adapt` on it).
      tx: the optimizer, from `make_optimizer`.
      mesh: of axes data, fsdp and tensor; each shape then has the sharding that its array would have, from the one
        table of rules. An abstract mesh will do: `leaf.sharding.shard_shape(leaf.shape)` is what a device holds.

    Raises:
      ValueError: no rule covers a variable.

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from melora_jax.models import abstract_model
    >>> sizes = dict(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
    ...              max_position_embeddings=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    ...     model = abstract_model(folder, task="causal-lm")
    >>> mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    >>> state, _ = abstract_train_state(model, optax.sgd(0.1), mesh)
    >>> state.trainable["lm_head"]["kernel"].get_raw_value().sharding.spec
    P('fsdp', 'tensor')
    """
    _, trainable, frozen, host = nnx.split(model, nnx.Param, FrozenParam, ...)
    opt_state = jax.eval_shape(tx.init, trainable)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    if mesh is None:
        return TrainState(step, trainable, opt_state, host), frozen
    places = shardings_on(model, mesh)
    trainable, frozen = (_placed(part, places) for part in (trainable, frozen))
    placed = shardings_like(opt_state, trainable, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    step, opt_state, host = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (step, opt_state, host),
        (whole, placed, jax.tree.map(lambda _: whole, host)),
    )
    return TrainState(step, trainable, opt_state, host), frozen


def shardings_on(model: Any, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """Where each variable of a model, adapted or not, belongs on a mesh, by its path; a host's own state apart.

    Raises:
      ValueError: no rule covers a variable, or an adapter runs on one device alone.
    """
    specs: dict[str, PartitionSpec] = {}
    for path, layer in walk(model):
        if isinstance(layer, MELoRADense):
            kernel = f"{path_of(path)}/base/{layer.view.kernel_name}"
            spec = factor_spec(model.layout.spec(kernel, layer.kernel_variable.shape, mesh), layer.spec, mesh)
            specs |= {f"{path_of(path)}/{name}": spec for name in ("a", "b")}
            if layer.extras and mesh.size > 1:
                kind = type(layer).__name__
                raise ValueError(
                    f"{path_of(path)} is a {kind}, which runs on one device and not on {mesh.size}; plan for one"
                )
            specs |= {f"{path_of(path)}/{name}": PartitionSpec() for name in layer.extras}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = path_of(path)
        if name not in specs:
            specs[name] = model.layout.spec(name, tuple(variable.shape), mesh)
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def _placed(state: nnx.State, places: dict[str, NamedSharding]) -> nnx.State:
    def placed(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path_of(path)])

    return jax.tree_util.tree_map_with_path(placed, state)
