"""`disable_adapters`: the outputs of the base, from a model that keeps its adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flax import nnx

from melora_jax.adapters.adapt import adapters_of, config_of
from melora_jax.adapters.melora import MELoRADense


@contextlib.contextmanager
def disable_adapters(model: nnx.Module) -> Iterator[None]:
    """Inside of the `with`, the adapted layers compute what their frozen base does: as PEFT's `disable_adapter()`.

    The outputs are those of `unwrap(model)` bit for bit, without a second copy of the model: the reference of a
    preference loss, or a check of what training changed. Modules of `modules_to_save` and biases that are trained keep
    what they learned. On leaving, also by an exception, each layer is as it was before, so blocks may be nested.

    Whether a layer is enabled is a static attribute, part of its graph definition: `nnx.jit` compiles the model once
    with adapters and once without. A training step that was made before keeps what it was made with.

    Args:
      model: an adapted model or one adapted layer; its layers may be stacked.

    Raises:
      ValueError: the model was not adapted.

    >>> import jax.numpy as jnp
    >>> layer = MELoRADense(8, 12, n=4, init="orthogonal", r=2, rngs=nnx.Rngs(0))
    >>> layer.b[...] += 1
    >>> x = jnp.ones((2, 8))
    >>> with disable_adapters(layer):
    ...     y = layer(x)
    >>> bool((y == layer.base(x)).all()), bool((y == layer(x)).all())
    (True, False)
    """
    layers = list(adapters_of(model).values())
    if not layers:
        config_of(model)  # a model that is trained without adapters has none to disable
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            _set_enabled(layer, False)
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            _set_enabled(layer, enabled)


def _set_enabled(layer: MELoRADense, enabled: bool) -> None:
    # NNX refuses to set attributes inside of a trace that the module comes from outside of. It is restored before the
    # trace ends, so nothing can leak.
    object.__setattr__(layer, "enabled", enabled)
