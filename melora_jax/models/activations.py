"""The activation functions that Hugging Face names in `hidden_act`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, `x/2 · (1 + erf(x/√2))`, computed in float32 and returned in the dtype of `x`.

    Source: Hendrycks and Gimpel 2016.

    >>> gelu(jnp.array([0.0, 1.0])).tolist()
    [0.0, 0.8413447141647339]
    """
    # jax.nn.gelu uses erfc, which XLA computes more slowly on CPU
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU.

    >>> round(float(gelu_tanh(jnp.array(1.0))), 4)
    0.8412
    """
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU, `x · σ(1.702 x)`.

    >>> round(float(quick_gelu(jnp.array(1.0))), 4)
    0.8458
    """
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_accurate": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_python_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "tanh": jnp.tanh,
}
