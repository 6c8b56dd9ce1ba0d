"""Training an adapted model: optimizer, step, losses, rank budget, populations and the mesh check.

Imports `models`, `adapters` and below.
"""

from melora_jax.training.ensemble import (
    Members,
    make_members,
    make_population_eval,
    make_population_step,
    member_state,
    population_state,
)
from melora_jax.training.losses import chunked_cross_entropy
from melora_jax.training.mesh_check import check_mesh
from melora_jax.training.optimizer import make_optimizer
from melora_jax.training.rank_allocator import RankBudget
from melora_jax.training.step import TrainState, abstract_train_state, make_train_step, train_state

__all__ = [
    "Members",
    "RankBudget",
    "TrainState",
    "abstract_train_state",
    "check_mesh",
    "chunked_cross_entropy",
    "make_members",
    "make_optimizer",
    "make_population_eval",
    "make_population_step",
    "make_train_step",
    "member_state",
    "population_state",
    "train_state",
]
