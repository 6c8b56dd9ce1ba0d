"""The kinds of adapter, each one class, by the settings that ask for it."""

from __future__ import annotations

from melora_jax.adapters.adalora import AdaLoRADense
from melora_jax.adapters.dora import DoRADense
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.pissa import PiSSADense
from melora_jax.config import AdapterSpec, Kind, MELoRAConfig

KINDS: dict[Kind, type[MELoRADense]] = {
    "plain": MELoRADense,
    "dora": DoRADense,
    "adalora": AdaLoRADense,
    "pissa": PiSSADense,
}


def kind_of(settings: AdapterSpec | MELoRAConfig) -> type[MELoRADense]:
    """The class of the layers that `adapt` puts in for these settings, which says what its kind of adapter needs.

    >>> kind_of(AdapterSpec(n=1, r=(2,), alpha=(2.0,), variant="dora")).__name__
    'DoRADense'
    """
    return KINDS[settings.kind]
