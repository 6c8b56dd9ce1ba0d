"""MELoRA for JAX and Flax: mini-ensemble low-rank adapters in any NNX model (arXiv 2402.17263)."""

from melora_jax.abstract import abstract_train_state
from melora_jax.adalora import AdaLoRADense, orthogonality
from melora_jax.adapters import export_peft, import_peft, load_adapter, save_adapter, spectra, warm_start
from melora_jax.config import MELoRAConfig
from melora_jax.dora import DoRADense
from melora_jax.dropout import dropout_key
from melora_jax.generation import Generation, NewTokens, generate, stream
from melora_jax.guard import check_mesh
from melora_jax.layers import MELoRADense
from melora_jax.members import Members, make_members
from melora_jax.merging import merge, unwrap
from melora_jax.models import abstract_model, from_pretrained, save_pretrained
from melora_jax.models.gguf_tokenizer import tokenizer_from_gguf
from melora_jax.optim import TrainState, make_optimizer, make_train_step, train_state
from melora_jax.orbax import save_orbax
from melora_jax.pissa import PiSSADense
from melora_jax.population import (
    make_population_eval,
    make_population_step,
    member_state,
    population_state,
)
from melora_jax.quantization import Quantization, quantize
from melora_jax.rank_budget import RankBudget
from melora_jax.sharding import batch_sharding, make_mesh
from melora_jax.stacking import Stacking, stack_layers, unstack_layers
from melora_jax.surgery import Adaptation, adapt, describe
from melora_jax.variables import BaseParam, FrozenParam, MELoRAParam

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
