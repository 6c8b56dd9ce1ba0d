"""Which layer an adapter's settings ask for: plain MELoRA, or one of the modules beside it."""

from __future__ import annotations

from melora_jax.adapters.adalora import AdaLoRADense
from melora_jax.adapters.dora import DoRADense
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.pissa import PiSSADense
from melora_jax.config import AdapterSpec


def layer_type(spec: AdapterSpec) -> type[MELoRADense]:
    """The layer that `adapt` puts in.

    >>> layer_type(AdapterSpec(n=1, r=(2,), alpha=(2.0,), variant="dora")).__name__
    'DoRADense'
    """
    if spec.init == "pissa":
        return PiSSADense
    variants: dict[str, type[MELoRADense]] = {"plain": MELoRADense, "dora": DoRADense, "adalora": AdaLoRADense}
    return variants[spec.variant]
