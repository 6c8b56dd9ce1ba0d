"""Flax definitions of Hugging Face models, loaded from and saved to their checkpoints.

Imports `nn`, `core` and below.
"""

from melora_jax.models.auto import Model, ModelOptions, abstract_model, model_from_config
from melora_jax.models.base import HFConfig, HuggingFaceModel, LoadReport
from melora_jax.models.hub.checkpoint import Checkpoint, ModelSource, open_checkpoint
from melora_jax.models.hub.load import from_pretrained
from melora_jax.models.hub.save import save_pretrained

__all__ = [
    "Checkpoint",
    "HFConfig",
    "HuggingFaceModel",
    "LoadReport",
    "Model",
    "ModelOptions",
    "ModelSource",
    "abstract_model",
    "from_pretrained",
    "model_from_config",
    "open_checkpoint",
    "save_pretrained",
]
