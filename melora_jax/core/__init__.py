"""One adapter on plain arrays, without Flax modules: formulas, start values, dropout, which paths a config means.

Imports `config`, `validation` and `files`.
"""

from melora_jax.core.spectrum import FLOAT32_RANK_TOLERANCE, effective_rank, numerical_rank

__all__ = ["FLOAT32_RANK_TOLERANCE", "effective_rank", "numerical_rank"]
