"""Flat views: the product of any supported layer seen as one dense map of `[..., d_in]` to `[..., d_out]`.

The adapter works on flat slices of the input and output. A view says how a layer's own input, output and kernel
are laid out, so that one adapter serves dense layers, einsums and embeddings of every framework.
"""

from __future__ import annotations

import dataclasses
import math
import string

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class DenseView:
    """A layer as `y = f(x)` with a flat kernel `[d_in, d_out]`.

    Attributes:
      d_in, d_out: flat sizes.
      kernel_name: the attribute that holds the kernel.
      order: the kernel's axes in the order (inputs, outputs); reshaped, it is `[d_in, d_out]`.
      in_axes: the axes of the input that are contracted, in the kernel's order (or, with `ascending`, in any).
      ascending: the kernel has its input axes in the order in which they lie in the input.
      out_shape: sizes of the output's feature axes, in the kernel's order.
      out_axes: where those axes lie in the output; `None` puts them last.
      batch: an einsum from the input's other axes, and a last one, to the output's; `None` leaves them as they are.
      lookup: the input is an array of indices; the kernel is applied to their one-hot rows.
    """

    d_in: int
    d_out: int
    kernel_name: str = "kernel"
    order: tuple[int, ...] = (0, 1)
    in_axes: tuple[int, ...] = (-1,)
    ascending: bool = False
    out_shape: tuple[int, ...] = ()
    out_axes: tuple[int, ...] | None = None
    batch: str | None = None
    lookup: bool = False

    def flatten_input(self, x: jax.Array) -> jax.Array:
        """The layer's input as `[..., d_in]`."""
        axes = [axis % x.ndim for axis in self.in_axes]
        x = jnp.moveaxis(x, sorted(axes) if self.ascending else axes, range(-len(axes), 0))
        return x.reshape(*x.shape[: x.ndim - len(self.in_axes)], self.d_in)

    def flat_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `flatten_input` for an input of `shape`; an array of indices stays as it is."""
        if self.lookup:
            return shape
        axes = {axis % len(shape) for axis in self.in_axes}
        return (*[size for axis, size in enumerate(shape) if axis not in axes], self.d_in)

    def unflatten_output(self, y: jax.Array) -> jax.Array:
        """`[..., d_out]` in the layout of the layer's output."""
        y = y if self.batch is None else jnp.einsum(self.batch, y)
        y = y.reshape(*y.shape[:-1], *self.out_shape)
        if self.out_axes is None:
            return y
        return jnp.moveaxis(y, range(-len(self.out_axes), 0), self.out_axes)

    def flatten_kernel(self, kernel: jax.Array) -> jax.Array:
        """A kernel as `[d_in, d_out]`."""
        return jnp.transpose(kernel, self.order).reshape(self.d_in, self.d_out)

    def unflatten_kernel(self, delta: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """`[d_in, d_out]` in the layout of a kernel of `shape`."""
        ordered = delta.reshape([shape[axis] for axis in self.order])
        return jnp.transpose(ordered, [self.order.index(axis) for axis in range(len(shape))])


def view_of_table(rows: int, features: int) -> DenseView:
    """The view of an embedding's table `[rows, features]`."""
    return DenseView(rows, features, kernel_name="embedding", out_shape=(features,), lookup=True)


def view_of_general(inputs: tuple[int, ...], outputs: tuple[int, ...], axes: tuple[int, ...]) -> DenseView:
    """The view of a kernel `[*inputs, *outputs]` that is contracted with those axes of its input."""
    return DenseView(
        math.prod(inputs),
        math.prod(outputs),
        order=tuple(range(len(inputs) + len(outputs))),
        in_axes=axes,
        ascending=True,
        out_shape=outputs,
    )


def view_at_call(equation: str, own: str, shape: tuple[int, ...], path: str) -> DenseView:
    """The view of an einsum whose equation is given at the call, where the factors belong to that of `own`.

    Raises:
      ValueError: the two sum over other axes of the kernel.
    """
    view, there = view_of_einsum(equation, shape), view_of_einsum(own, shape)
    if (view.order, view.d_in) != (there.order, there.d_in):
        raise ValueError(
            f"Einsum at {path} is called with {equation!r}, which uses its kernel in another way than its own {own!r}; "
            f"leave the layer out with exclude={[path]}"
        )
    return view


def view_of_einsum(equation: str, shape: tuple[int, ...]) -> DenseView:
    """The view of `einsum(equation, x, kernel)` for a kernel of `shape`.

    Each kernel label must either be summed with the input or appear in the output alone.

    Raises:
      ValueError: an equation in which the kernel is more than one `[d_in, d_out]`.

    >>> view = view_of_einsum("...td,hdk->...htk", (2, 6, 5))
    >>> view.d_in, view.d_out, view.order
    (6, 10, (1, 0, 2))
    """
    operands, _, out = equation.replace(" ", "").partition("->")
    x, kernel = operands.split(",")
    inputs = [label for label in kernel if label in x and label not in out]
    outputs = [label for label in kernel if label in out and label not in x]
    stray = sorted(set(kernel) - set(inputs) - set(outputs))
    if stray or "." in kernel or not inputs or not outputs or any(_repeats(term) for term in (x, kernel, out)):
        why = f"kernel label(s) {stray} are neither summed nor new" if stray else "it sums nothing, or repeats a label"
        raise ValueError(f"Einsum {equation!r} has no flat kernel [d_in, d_out]: {why}")
    sizes = dict(zip(kernel, shape, strict=True))
    return DenseView(
        math.prod(sizes[label] for label in inputs),
        math.prod(sizes[label] for label in outputs),
        order=tuple(kernel.index(label) for label in inputs + outputs),
        in_axes=tuple(_axis(x, label) for label in inputs),
        out_shape=tuple(sizes[label] for label in outputs),
        out_axes=tuple(_axis(out, label) for label in outputs),
        batch=_batch_equation(x, kernel, out),
    )


def unadaptable(path: str, reason: object) -> ValueError:
    """The error for a matched module that has no flat view."""
    return ValueError(f"{path} can't be adapted: {reason}; leave it out with exclude={[path]}")


def _repeats(term: str) -> bool:
    labels = term.replace("...", "")
    return len(set(labels)) < len(labels)


def _axis(term: str, label: str) -> int:
    """The axis of `label` in an einsum term, counted from the end if an ellipsis stands before it."""
    at = term.index(label)
    return at - len(term) if "..." in term[:at] else at


def _batch_equation(x: str, kernel: str, out: str) -> str | None:
    """What becomes of the labels that the kernel has not: kept, permuted or summed."""
    before, after = ("".join(label for label in term if label not in kernel) for term in (x, out))
    if before == after:
        return None
    last = next(label for label in string.ascii_letters if label not in x + kernel + out)
    return f"{before}{last}->{after}{last}"
