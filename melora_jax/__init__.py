"""MELoRA for JAX and Flax: mini-ensemble low-rank adapters in any NNX model (arXiv 2402.17263)."""

from melora_jax.adapters import FrozenParam, MELoRADense, MELoRAParam, adapt, describe, disable_adapters, merge, unwrap
from melora_jax.checkpoints import export_peft, import_peft, load_adapter, save_adapter, warm_start
from melora_jax.config import MELoRAConfig
from melora_jax.core.dropout import dropout_key
from melora_jax.generation import generate
from melora_jax.models import from_pretrained, save_pretrained
from melora_jax.nn import make_mesh, quantize, stack_layers
from melora_jax.training import TrainState, make_optimizer, make_train_step, train_state

__version__ = "0.1.0"

__all__ = [
    "FrozenParam",
    "MELoRAConfig",
    "MELoRADense",
    "MELoRAParam",
    "TrainState",
    "adapt",
    "describe",
    "disable_adapters",
    "dropout_key",
    "export_peft",
    "from_pretrained",
    "generate",
    "import_peft",
    "load_adapter",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "merge",
    "quantize",
    "save_adapter",
    "save_pretrained",
    "stack_layers",
    "train_state",
    "unwrap",
    "warm_start",
]
