"""Which modules one call of a Linen model reaches, and the layout of their kernels, by Linen's layer types."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from melora_jax.core.dense_view import DenseView, view_of_einsum, view_of_general, view_of_table
from melora_jax.linen.lifted_axes import NOT_LIFTED, Lifting, lifting_from_markers, marker_shapes
from melora_jax.linen.tree import Flat, flat_from_tree, joined, parts

LINEAR = (nn.Dense, nn.DenseGeneral, nn.Einsum)
"""The layers that "all-linear" targets."""

_MARKERS = "melora_markers"
_NO_KERNEL = "has no dense kernel [d_in, d_out]; adaptable are Dense, DenseGeneral, Einsum and Embed"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose kernel can be viewed as a matrix.

    Attributes:
      view: how its input, output and kernel become flat.
      kernel_shape: the kernel's shape inside the model's transforms.
      equation: an Einsum's equation at its first call.
      lifting: the axes that the transforms add to the kernel.
    """

    view: DenseView
    kernel_shape: tuple[int, ...]
    equation: str | None = None
    lifting: Lifting = NOT_LIFTED


@dataclasses.dataclass(frozen=True)
class CalledModule:
    """A module that was called: whether `"all-linear"` targets it, and its layer or why it can't be adapted."""

    linear: bool
    layer: Layer | None = None
    reason: str = ""

    def lifted(self, lifting: Lifting) -> CalledModule:
        """The same module with the axes that transforms add to its kernel."""
        return (
            self if self.layer is None else CalledModule(self.linear, dataclasses.replace(self.layer, lifting=lifting))
        )


def is_layer(module: nn.Module, method: str) -> bool:
    """Whether this method call may need an adapter's output."""
    return (method == "__call__" and isinstance(module, (*LINEAR, nn.Embed))) or (
        method == "attend" and isinstance(module, nn.Embed)
    )


def is_linear(module: nn.Module) -> bool:
    """Whether `"all-linear"` targets the module."""
    return isinstance(module, LINEAR)


def arguments_of(context: nn.module.InterceptorContext, args: Any, kwargs: Any) -> dict[str, Any]:
    """A call's arguments by name, in the order of the method's parameters."""
    return inspect.signature(context.orig_method).bind(*args, **kwargs).arguments


def equation_of(module: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    """The equation of an Einsum's call; None for other layers."""
    return (arguments.get("einsum_str") or module.einsum_str) if isinstance(module, nn.Einsum) else None


def called_modules(
    module: nn.Module, variables: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, CalledModule]:
    """The modules that `module.apply(variables, *args, **kwargs)` calls, by path, in the order their first calls end.

    The call is traced, not computed.
    """
    follower = _Follower(flat_from_tree(variables["params"]))

    def call(variables: Mapping[str, Any]) -> Any:
        with nn.intercept_methods(follower):
            _, changed = module.apply(variables, *args, **{**kwargs, "mutable": True})
        return changed["params"]

    outside = flat_from_tree(jax.eval_shape(call, variables))
    for path, inside in follower.markers.items():
        found = [outside[(*parts(path), _MARKERS, str(k))].shape for k in range(len(inside))]
        follower.called[path] = follower.called[path].lifted(lifting_from_markers(inside, found))
    return follower.called


class _Follower:
    """A method interceptor that records each module and stores markers beside kernels with axes of transforms."""

    def __init__(self, params: Flat) -> None:
        self.params = params
        self.called: dict[str, CalledModule] = {}
        self.layers: set[str] = set()
        self.markers: dict[str, tuple[Shape, Shape]] = {}

    def __call__(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        # Of two nested calls at one path, the inner one is recorded first: a layer that a transform wraps, such as
        # nn.vmap(nn.Dense), or that shares its scope with the module around it.
        module, path = context.module, joined(context.module.path)
        if not is_layer(module, context.method_name):
            if context.method_name != "setup":
                self.called.setdefault(path, CalledModule(False, reason=f"{type(module).__name__} {_NO_KERNEL}"))
            return y
        if path not in self.layers:
            self.layers.add(path)
            self.called[path] = self._called_layer(module, path, arguments_of(context, args, kwargs))
        if path in self.markers and len(_kernel_shape(module) or ()) == len(self.markers[path][0]):
            # At each call, because a transform may trace its body more than once.
            zeros = {str(k): jnp.zeros(shape) for k, shape in enumerate(self.markers[path])}
            module.scope.put_variable("params", _MARKERS, zeros)
        return y

    def _called_layer(self, module: Any, path: str, arguments: Mapping[str, Any]) -> CalledModule:
        """The layer at this call. If its kernel is part of a larger one, its markers are noted."""
        linear, equation = is_linear(module), equation_of(module, arguments)
        whole, shape = self.params.get((*module.path, _kernel_name(module))), _kernel_shape(module)
        if whole is None or shape is None:
            return CalledModule(linear, reason=f"it has no {_kernel_name(module)} of its own in params")
        try:
            layer = Layer(_view_of(module, shape, equation), shape, equation)
        except ValueError as error:
            return CalledModule(linear, reason=str(error))
        whole = jnp.shape(meta.unbox(whole))
        if len(whole) > len(shape) and module.is_mutable_collection("params"):
            self.markers[path] = marker_shapes(len(shape), whole)
        elif whole != shape:
            reason = f"a transform around it makes its kernel {list(shape)} of params' {list(whole)}"
            return CalledModule(linear, reason=reason)
        return CalledModule(linear, layer)


def _kernel_name(module: nn.Module) -> str:
    return "embedding" if isinstance(module, nn.Embed) else "kernel"


def _kernel_shape(module: nn.Module) -> Shape | None:
    """The shape of the kernel that the module's call sees."""
    kernel = module.get_variable("params", _kernel_name(module))
    return None if kernel is None else jnp.shape(meta.unbox(kernel))


def _view_of(module: nn.Module, shape: Shape, equation: str | None) -> DenseView:
    """The flat view of a layer whose kernel has this shape.

    Raises:
      ValueError: there is none; the message is the reason.
    """
    if equation is not None:
        return view_of_einsum(equation, shape)
    if isinstance(module, nn.Embed):
        return view_of_table(*shape)
    if isinstance(module, nn.DenseGeneral):
        if module.batch_dims:
            axes = tuple(module.batch_dims)
            raise ValueError(
                f"DenseGeneral with batch_dims={axes} holds one kernel a batch entry, not one [d_in, d_out]"
            )
        axes = module.axis if isinstance(module.axis, Iterable) else (module.axis,)
        return view_of_general(shape[: len(axes)], shape[len(axes) :], tuple(axes))
    return view_of_general(shape[:1], shape[1:], (-1,))
