"""Adapters on NNX models: parameter types, the kinds of adapter, which modules get one, adapting and merging.

Imports `nn`, `core` and below.
"""

from melora_jax.adapters.adalora import AdaLoRADense, orthogonality
from melora_jax.adapters.adapt import adapt, describe
from melora_jax.adapters.disable import disable_adapters
from melora_jax.adapters.dora import DoRADense
from melora_jax.adapters.kinds import kind_of
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.merge import merge, unwrap
from melora_jax.adapters.params import BaseParam, FrozenParam, MELoRAParam
from melora_jax.adapters.pissa import PiSSADense
from melora_jax.core.report import Adaptation

__all__ = [
    "AdaLoRADense",
    "Adaptation",
    "BaseParam",
    "DoRADense",
    "FrozenParam",
    "MELoRADense",
    "MELoRAParam",
    "PiSSADense",
    "adapt",
    "describe",
    "disable_adapters",
    "kind_of",
    "merge",
    "orthogonality",
    "unwrap",
]
