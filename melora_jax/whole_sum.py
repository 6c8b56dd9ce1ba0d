"""A layer's output plus its adapter's, summed once."""

from __future__ import annotations

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def whole_sum(y: jax.Array, update: jax.Array) -> jax.Array:
    """y + update, an array of its own on a machine of one CPU device.

    XLA on CPU would add anew wherever the sum is read, and keep both until the backward pass has done so too: a step of
    SmolLM2 (2 x 256 tokens, all linear layers adapted by LoRA r=8) planned 1,830 MB, and plans 1,641.

    >>> whole_sum(jax.numpy.ones(3), jax.numpy.ones(3)).tolist()
    [2.0, 2.0, 2.0]
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return y + update
    return _whole_sum(y, update)


@jax.custom_jvp
def _whole_sum(y: jax.Array, update: jax.Array) -> jax.Array:
    # What puts operations together does not look into a call that may not be inlined; a barrier is gone before it runs.
    with set_xla_metadata(inlineable="false"):
        return _called(y, update)


@_whole_sum.defjvp
def _derivative(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _whole_sum(*primals), tangents[0] + tangents[1]


@jax.jit
def _called(y: jax.Array, update: jax.Array) -> jax.Array:
    return y + update
