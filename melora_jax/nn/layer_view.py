"""The flat view of an NNX layer: `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed`, or a quantised one."""

from __future__ import annotations

from flax import nnx

from melora_jax.core.dense_view import DenseView, unadaptable, view_of_einsum, view_of_general, view_of_table
from melora_jax.nn.quantized import QuantizedLinear
from melora_jax.nn.sharding import mesh_of
from melora_jax.validation import check_sizes


def view_of(layer: nnx.Module) -> DenseView:
    """The flat view of a layer.

    Raises:
      ValueError: a layer that has none, with the reason. The message has no path: the caller knows it.

    >>> view = view_of(nnx.LinearGeneral(6, (2, 5), rngs=nnx.Rngs(0)))
    >>> view.d_in, view.d_out
    (6, 10)
    """
    if isinstance(layer, nnx.Linear | QuantizedLinear):
        return DenseView(layer.in_features, layer.out_features, out_shape=(layer.out_features,))
    if isinstance(layer, nnx.Embed):
        return view_of_table(layer.num_embeddings, layer.features)
    if isinstance(layer, nnx.LinearGeneral):
        return _view_of_linear_general(layer)
    if isinstance(layer, nnx.Einsum):
        return view_of_einsum(layer.einsum_str, tuple(layer.kernel_shape))
    kind = type(layer).__name__
    raise ValueError(f"{kind} has no dense kernel [d_in, d_out]; adaptable are Linear, LinearGeneral, Einsum and Embed")


def _view_of_linear_general(layer: nnx.LinearGeneral) -> DenseView:
    if layer.batch_axis:
        axes = dict(layer.batch_axis)
        raise ValueError(f"LinearGeneral with batch_axis={axes} holds one kernel a batch entry, not one [d_in, d_out]")
    return view_of_general(tuple(layer.in_features), tuple(layer.out_features), tuple(layer.axis))


def checked_view(layer: nnx.Module, n: int, path: str) -> DenseView:
    """The layer's flat view, once it is known that n divides it.

    Raises:
      ValueError: no flat view, or sizes that n does not divide; both name the path and the remedy.
    """
    try:
        view = view_of(layer)
    except ValueError as error:
        raise unadaptable(path, error) from None
    check_sizes(view.d_in, view.d_out, n, path)
    return view


def refuse_mesh(kernel: nnx.Variable, what: str, path: str) -> None:
    """Raises ValueError if a kernel lies on a mesh, where `what` is not supported."""
    mesh = mesh_of(kernel.get_raw_value())
    if mesh is not None and mesh.size > 1:
        raise ValueError(f"{what} does not run on a mesh, where {path} lies; take one device, or a plain adapter")
