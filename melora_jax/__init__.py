"""MELoRA for JAX and Flax: mini-ensemble low-rank adapters in any NNX model (arXiv 2402.17263)."""

from melora_jax.adapters.adalora import AdaLoRADense, orthogonality
from melora_jax.adapters.adapt import Adaptation, adapt, describe
from melora_jax.adapters.dora import DoRADense
from melora_jax.adapters.melora import MELoRADense
from melora_jax.adapters.merge import merge, unwrap
from melora_jax.adapters.params import BaseParam, FrozenParam, MELoRAParam
from melora_jax.adapters.pissa import PiSSADense
from melora_jax.checkpoints.orbax import save_orbax
from melora_jax.checkpoints.save_load import export_peft, import_peft, load_adapter, save_adapter, spectra, warm_start
from melora_jax.config import MELoRAConfig
from melora_jax.core.dropout import dropout_key
from melora_jax.generation.generate import Generation, NewTokens, generate, stream
from melora_jax.models import abstract_model, from_pretrained, save_pretrained
from melora_jax.models.gguf.tokenizer import tokenizer_from_gguf
from melora_jax.nn.quantized import Quantization, quantize
from melora_jax.nn.scan_layers import Stacking, stack_layers, unstack_layers
from melora_jax.nn.sharding import batch_sharding, make_mesh
from melora_jax.training.abstract import abstract_train_state
from melora_jax.training.ensemble import (
    make_population_eval,
    make_population_step,
    member_state,
    population_state,
)
from melora_jax.training.members import Members, make_members
from melora_jax.training.mesh_check import check_mesh
from melora_jax.training.optimizer import TrainState, make_optimizer, make_train_step, train_state
from melora_jax.training.rank_allocator import RankBudget

__version__ = "0.1.0"

__all__ = [
    "AdaLoRADense",
    "Adaptation",
    "BaseParam",
    "DoRADense",
    "FrozenParam",
    "Generation",
    "MELoRAConfig",
    "MELoRADense",
    "MELoRAParam",
    "Members",
    "NewTokens",
    "PiSSADense",
    "Quantization",
    "RankBudget",
    "Stacking",
    "TrainState",
    "abstract_model",
    "abstract_train_state",
    "adapt",
    "batch_sharding",
    "check_mesh",
    "describe",
    "dropout_key",
    "export_peft",
    "from_pretrained",
    "generate",
    "import_peft",
    "load_adapter",
    "make_members",
    "make_mesh",
    "make_optimizer",
    "make_population_eval",
    "make_population_step",
    "make_train_step",
    "member_state",
    "merge",
    "orthogonality",
    "population_state",
    "quantize",
    "save_adapter",
    "save_orbax",
    "save_pretrained",
    "spectra",
    "stack_layers",
    "stream",
    "tokenizer_from_gguf",
    "train_state",
    "unstack_layers",
    "unwrap",
    "warm_start",
]
