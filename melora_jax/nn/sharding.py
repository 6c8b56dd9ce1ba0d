"""Meshes, and the sharding of variables and activations by path and shape.

A mesh has three axes. `data` and `fsdp` split the rows of a batch; `fsdp` also splits the base's kernels, which are
gathered for each use; `tensor` splits the heads and the inner features. Variables carry no sharding metadata. Instead,
the ordered table `RULES` maps a variable's path to its logical axes, and `MESH_AXES` maps these to mesh axes. The mesh
in force is JAX's own: `with jax.set_mesh(mesh):`, or `make_train_step(..., mesh=mesh)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from melora_jax.nn.tree import path_of, without_base

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)

# The first pattern that matches the end of a path applies. None: an axis that is never sharded.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(word_embeddings|embed_tokens)/embedding", ("vocab", "embed")),
    (r"(position|token_type)_embeddings/embedding", (None, "embed")),
    (r"(query|q_proj|q_lin)/kernel", ("embed", "heads")),
    (r"(query|q_proj|q_lin)/bias", ("heads",)),
    (r"(key|value|k_proj|v_proj|k_lin|v_lin)/kernel", ("embed", "kv_heads")),
    (r"(key|value|k_proj|v_proj|k_lin|v_lin)/bias", ("kv_heads",)),
    (r"(attention/output/dense|o_proj|out_lin)/kernel", ("heads", "embed")),
    (r"(intermediate/dense|gate_proj|up_proj|lin1)/kernel", ("embed", "mlp")),
    (r"(intermediate/dense|gate_proj|up_proj|lin1)/bias", ("mlp",)),
    (r"(output/dense|down_proj|lin2)/kernel", ("mlp", "embed")),
    (r"(output/dense|o_proj|out_lin|down_proj|lin2)/bias", (None,)),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"(pooler/dense|pre_classifier|classifier/dense|classifier/out_proj|classifier|score)/kernel", ("embed", None)),
    (r"(pooler/dense|pre_classifier|classifier/dense|classifier/out_proj|classifier)/bias", (None,)),
    (r"\w*(layer_?norm|LayerNorm|norm)/(scale|bias)", (None,)),
)
_CODES = r"/codes$|(?<!norm)(?<!Norm)/scale$"  # quantised codes and scales are sharded like their kernel
MESH_AXES: dict[str, str] = {"vocab": TENSOR, "embed": FSDP, "heads": TENSOR, "kv_heads": TENSOR, "mlp": TENSOR}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of all devices of all processes with the axes data, fsdp and tensor, which XLA partitions (Auto axes).

    One of the three sizes may be -1, which stands for the remaining devices.

    Args:
      data: the number of parts into which the rows of a batch are split; each part holds the whole base.
      fsdp: the same, but the base's kernels are split too, and gathered for each use.
      tensor: the number of parts into which heads, inner features and mini-adapters are split.

    Raises:
      ValueError: a size is below 1, more than one is -1, or the product is not the number of devices.

    >>> make_mesh().axis_names, make_mesh(data=-1).size == jax.device_count()
    (('data', 'fsdp', 'tensor'), True)
    """
    sizes, devices = _filled((data, fsdp, tensor), jax.device_count()), jax.device_count()
    if math.prod(sizes) != devices:
        asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"a mesh of {asked} needs {math.prod(sizes)} devices, there are {devices}; choose sizes whose product is "
            f"{devices}, or -1 for one of them"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _filled(sizes: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """`sizes` with -1 replaced by the number of remaining devices."""
    for name, size in zip(AXES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise ValueError(f"mesh axis {name}={size!r} must be a whole number of at least 1, or -1 for the rest")
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh sizes {sizes} hold -1 more than once; only one axis can take the rest of the devices")
    rest = devices // math.prod(size for size in sizes if size != -1)
    return tuple(max(rest, 1) if size == -1 else size for size in sizes)


def active_mesh() -> AbstractMesh | None:
    """The mesh in force if it has our axes, all of them Auto, and more than one device; otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES or mesh.size == 1 or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Like `jax.set_mesh`, but may be entered while a function is traced; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sharding of one model's variables: `RULES` and the model's numbers of heads.

    Attributes:
      heads, kv_heads: of its attention. An axis of heads is cut between heads, never inside one.
    """

    heads: int
    kv_heads: int

    def units(self, path: str, shape: tuple[int, ...]) -> tuple[int | None, ...]:
        """For each axis of a variable, the number of units between which `tensor` may cut it; None if it may not.

        >>> Layout(heads=4, kv_heads=2).units("layers/0/self_attn/k_proj/kernel", (24, 12))
        (None, 2)
        """
        return tuple(
            self._units(axis, size) if axis is not None and MESH_AXES[axis] == TENSOR else None
            for axis, size in zip(logical_axes(path, shape), shape, strict=True)
        )

    def _units(self, axis: str, size: int) -> int:
        return {"heads": self.heads, "kv_heads": self.kv_heads}.get(axis, size)

    def spec(self, path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """The partition of the variable at `path`. An axis whose size its mesh axis does not divide is not cut.

        Raises:
          ValueError: no rule covers the path.

        >>> mesh = AbstractMesh((1, 2, 2), AXES)
        >>> Layout(heads=4, kv_heads=1).spec("layers/0/self_attn/q_proj/kernel", (24, 24), mesh)
        P('fsdp', 'tensor')
        >>> Layout(heads=4, kv_heads=1).spec("layers/0/self_attn/k_proj/kernel", (24, 6), mesh)
        P('fsdp', None)
        """
        axes = []
        for axis, size in zip(logical_axes(path, shape), shape, strict=True):
            over = None if axis is None else MESH_AXES[axis]
            # A quantised kernel may have fewer scales than units.
            parts = 1 if over is None else mesh.shape[over]
            divides = axis is not None and self._units(axis, size) % parts == size % parts == 0
            axes.append(over if divides else None)
        return PartitionSpec(*axes)


def logical_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The logical axes of the variable at `path`. Leading axes that its rule lacks, those of a stack, are None.

    Raises:
      ValueError: no rule covers the path, or the rule has more axes than the variable.

    >>> logical_axes("bert/encoder/layer/0/attention/output/dense/kernel", (8, 8))
    ('heads', 'embed')
    """
    plain = re.sub(_CODES, "/kernel", without_base(path))  # quantised
    for pattern, axes in RULES:
        if re.search(rf"(?:^|/){pattern}$", plain) and len(axes) <= len(shape):
            return (None,) * (len(shape) - len(axes)) + axes
    raise ValueError(
        f"no sharding rule covers {path} of shape {list(shape)}; add its path and logical axes to RULES in "
        "melora_jax/nn/sharding.py"
    )


def batch_spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[tuple[str, ...] | None, ...]:
    """The partition of an array whose first axis is the batch: over data and fsdp if they divide it."""
    parts = mesh.shape[DATA] * mesh.shape[FSDP]
    rows = BATCH if shape and shape[0] % parts == 0 else None
    return (rows, *[None] * (len(shape) - 1))[: len(shape)]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's arrays: their first axis over data and fsdp.

    Args:
      mesh: from `make_mesh`.

    >>> batch_sharding(make_mesh(data=-1)).spec
    P(('data', 'fsdp'),)
    """
    return NamedSharding(mesh, PartitionSpec(BATCH))


def constrain(x: jax.Array, tensor: int | None = None, *, rows: int = 0) -> jax.Array:
    """Constrains the sharding of an activation; without a mesh in force, returns `x`.

    Args:
      x: any array.
      tensor: the number of the axis to split over tensor, if tensor divides it; None for none.
      rows: the number of the batch's axis, which is split over data and fsdp if they divide it.
    """
    mesh = active_mesh()
    if mesh is None:
        return x
    axes: list[tuple[str, ...] | str | None] = [*[None] * rows, *batch_spec(x.shape[rows:], mesh)]
    if tensor is not None and x.shape[tensor] % mesh.shape[TENSOR] == 0:
        axes[tensor] = TENSOR
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def mesh_of(array: object) -> Mesh | None:
    """The mesh of an array or abstract array, if it has our axes; None otherwise."""
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.axis_names == AXES:
        return sharding.mesh
    return None


def shardings_of(tree: Any) -> Any:
    """The tree of the arrays' shardings."""
    return jax.tree.map(lambda x: x.sharding, tree)


def shardings_like(tree: Any, parameters: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shardings of an optimizer's state: each leaf that belongs to a parameter has that parameter's sharding.

    Args:
      tree: the state, of arrays or abstract arrays.
      parameters: what it optimizes. A leaf belongs to a parameter if its path ends with the parameter's path and their
        shapes are equal. Other leaves, such as counts, are replicated.
      mesh: the mesh of the parameters.
    """
    placed = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            parameter = placed.get(path_of(path[start:]))
            if parameter is not None and parameter.shape == leaf.shape:
                return parameter.sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def mesh_of_tree(tree: Any) -> Mesh | None:
    """The mesh of the first array in a tree that has one (see `mesh_of`); None if none has."""
    return next((mesh for leaf in jax.tree.leaves(tree) if (mesh := mesh_of(leaf)) is not None), None)


def put(value: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places an array on a mesh. Every process must pass the whole array."""
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
