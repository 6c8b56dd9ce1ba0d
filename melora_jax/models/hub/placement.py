"""Where each variable of a model belongs on a mesh, and how its dense layers may be cut."""

from __future__ import annotations

from typing import TypeVar

from flax import nnx
from jax.sharding import Mesh, NamedSharding

from melora_jax.models.base import HuggingFaceModel
from melora_jax.nn.parallel import KernelCut, ParallelLinear, Table
from melora_jax.nn.sharding import Layout, put
from melora_jax.nn.tree import path_of, variables_of

M = TypeVar("M", bound=HuggingFaceModel)


def lay_out(model: HuggingFaceModel, layout: Layout) -> None:
    """Gives a new model its layout, and each dense layer and table the ways in which it may be cut."""
    model.layout = layout
    for path, module in nnx.iter_graph(model):
        if isinstance(module, ParallelLinear):
            inputs, outputs = layout.units(f"{path_of(path)}/kernel", tuple(module.kernel.shape))
            module.cut = KernelCut(inputs, outputs)
        elif isinstance(module, Table):
            module.units = layout.units(f"{path_of(path)}/embedding", tuple(module.embedding.shape))[0]


def shardings_of(model: HuggingFaceModel, mesh: Mesh | None) -> dict[str, NamedSharding]:
    """Where each variable of an unadapted model belongs, by its path; empty without a mesh.

    Raises:
      ValueError: no rule covers a variable.
    """
    if mesh is None:
        return {}
    return {
        path: NamedSharding(mesh, model.layout.spec(path, tuple(variable.shape), mesh))
        for path, variable in variables_of(model).items()
    }


def place_model(model: M, mesh: Mesh) -> M:
    """Puts the variables of an unadapted model, which every process has whole, on a mesh, in place.

    Raises:
      ValueError: no rule covers a variable.
    """
    shardings = shardings_of(model, mesh)
    for path, variable in variables_of(model).items():
        variable.set_value(put(variable[...], shardings[path]))
    return model
