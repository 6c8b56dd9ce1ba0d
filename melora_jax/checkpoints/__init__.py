"""Adapters on disk: our own format, PEFT's, orbax, model cards, inspection and arithmetic.

Imports `training`, `models`, `adapters` and below.
"""

from melora_jax.checkpoints.orbax import save_orbax
from melora_jax.checkpoints.save_load import export_peft, import_peft, load_adapter, save_adapter, spectra, warm_start

__all__ = ["export_peft", "import_peft", "load_adapter", "save_adapter", "save_orbax", "spectra", "warm_start"]
