"""Our own Flax definitions of Hugging Face models, loaded from and saved to Hugging Face checkpoints."""

from melora_jax.models.auto import Model, model_from_config
from melora_jax.models.base import HFConfig, HuggingFaceModel, LoadReport
from melora_jax.models.hub.load import abstract_model, from_pretrained
from melora_jax.models.hub.save import save_pretrained

__all__ = [
    "HFConfig",
    "HuggingFaceModel",
    "LoadReport",
    "Model",
    "abstract_model",
    "from_pretrained",
    "model_from_config",
    "save_pretrained",
]
