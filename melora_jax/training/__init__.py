"""Training an adapted model: optimizer, step, rank budget, populations and the mesh check.

Imports `models`, `adapters` and below.
"""

from melora_jax.training.abstract import abstract_train_state
from melora_jax.training.ensemble import make_population_eval, make_population_step, member_state, population_state
from melora_jax.training.members import Members, make_members
from melora_jax.training.mesh_check import check_mesh
from melora_jax.training.optimizer import TrainState, make_optimizer, make_train_step, train_state
from melora_jax.training.rank_allocator import RankBudget

__all__ = [
    "Members",
    "RankBudget",
    "TrainState",
    "abstract_train_state",
    "check_mesh",
    "make_members",
    "make_optimizer",
    "make_population_eval",
    "make_population_step",
    "make_train_step",
    "member_state",
    "population_state",
    "train_state",
]
