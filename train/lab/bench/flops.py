"""How much arithmetic a model takes: the multiplications and additions of its matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Peak FLOP/s of dense bfloat16 products, from the makers' data sheets; the keys are parts of a device's kind.
_PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def forward_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """FLOPs of a function's matrix products, each turn of its loops counted; its arguments are arrays or their shapes.

    >>> import jax.numpy as jnp
    >>> forward_flops(lambda x, w: x @ w, jnp.ones((3, 5)), jnp.ones((5, 7)))
    210
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def peak_flops(kind: str, dtype: str) -> float | None:
    """A device's peak FLOP/s for products in `dtype`; None if it is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bfloat16"), peak_flops("cpu", "float32")
    (989000000000000.0, None)
    """
    return next((peak for part, peak in _PEAKS.items() if part in kind), None) if dtype == "bfloat16" else None


def _flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            made: Any = equation.outvars[0].aval
            total += 2 * math.prod(left.shape[axis] for axis in contracted) * math.prod(made.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(_flops(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
