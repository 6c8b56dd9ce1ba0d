"""AdaLoRA's allocation of ranks, as an optax transformation whose state is part of the optimizer's.

    sensitivity   I = |w·∂L/∂w|          for each entry of A, e and B
    smoothed      Ī = β1·Ī + (1 - β1)·I,    Ū = β2·Ū + (1 - β2)·|I - Ī|
    score         S = Ī·Ū of e  +  mean of Ī·Ū over the column of A  +  mean of Ī·Ū over the row of B, for each latent
    budget        target + (start - target)·(1 - (t - tinit) / (total - tfinal - tinit))³

Every `delta_t` steps, the latents of the whole model with the largest S are kept, as many as the budget allows, and e
of the others is set to zero. A masked e may grow again until step total - tfinal, whose choice is final.

Source: AdaLoRA (arXiv 2303.10512), section 3, in the form of PEFT's `RankAllocator`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from melora_jax import validation
from melora_jax.adapters.melora import MELoRADense
from melora_jax.nn.tree import path_of, walk

_Site = dict[str, Array]  # the arrays a, e and b of one layer, or of a stack of layers
_NAMES = ("a", "b", "e")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankBudget:
    """How many latents AdaLoRA keeps, and when. The names are those of PEFT's `AdaLoraConfig`.

    Attributes:
      target_r: the mean rank of a mini-adapter at the end.
      total_step: optimizer steps of the whole training.
      tinit, tfinal: steps at the start and at the end in which the choice of latents does not change.
      delta_t: steps from one choice to the next (PEFT: deltaT).
      beta1, beta2: decay rates of sensitivity and uncertainty, above 0 and below 1.

    Raises:
      ValueError: a value is out of range, or no step lies between tinit and total_step - tfinal.

    Source: AdaLoRA (arXiv 2303.10512), section 3.3.

    >>> RankBudget(target_r=2, total_step=10, tinit=2, tfinal=3).schedule(8, 4).tolist()
    [8, 8, 8, 6, 4, 4, 4, 4, 4, 4, 4]
    """

    target_r: int
    total_step: int
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name in ("target_r", "total_step", "delta_t"):
            validation.check_count(name, getattr(self, name))
        for name in ("tinit", "tfinal"):
            validation.check_count(name, getattr(self, name), low=0)
        for name in ("beta1", "beta2"):
            validation.check_number(name, getattr(self, name), low=np.finfo(float).tiny, below=1.0)
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} in which "
                "ranks are allocated; lower them, or train for longer"
            )

    @property
    def last(self) -> int:
        """The step at which the latents are chosen for the last time."""
        return self.total_step - self.tfinal

    def schedule(self, start: int, target: int) -> np.ndarray:
        """How many latents the model may have after each step from 0 to `total_step`, int32."""
        steps = np.arange(self.total_step + 1)
        left = 1 - (steps - self.tinit) / (self.last - self.tinit)
        falling = ((start - target) * left**3 + target).astype(np.int32)
        return np.where(steps <= self.tinit, start, np.where(steps > self.last, target, falling)).astype(np.int32)


class RankState(NamedTuple):
    """The state of `within_budget`.

    Attributes:
      inner: the state of the wrapped optimizer.
      step: the number of finished steps, int32.
      sensitivity, uncertainty: Ī and Ū by layer and factor.
      kept: by layer, which latents the last choice kept, bool.
    """

    inner: optax.OptState
    step: Array
    sensitivity: dict[str, _Site]
    uncertainty: dict[str, _Site]
    kept: dict[str, Array]


def within_budget(
    model: nnx.Module, tx: optax.GradientTransformation, budget: RankBudget
) -> optax.GradientTransformation:
    """Wraps an optimizer: after each update of `tx`, the least important entries of AdaLoRA's e are set to zero.

    As in PEFT, sensitivities use the updated parameters and the gradients that `tx` receives.

    Args:
      model: gives the paths of its AdaLoRA layers.
      tx: the optimizer.
      budget: the budget. Its steps count from 1.

    Raises:
      ValueError: the model has no AdaLoRA layer, or `target_r` is above its rank.
    """
    sites = _sites_of(model)
    minis = sum(math.prod(layer.e.shape[:-1]) for layer in sites.values())
    start, r = (
        sum(math.prod(layer.e.shape) for layer in sites.values()),
        max(layer.spec.r[0] for layer in sites.values()),
    )
    if budget.target_r > min(layer.spec.r[0] for layer in sites.values()):
        raise ValueError(
            f"target_r={budget.target_r} is above the r={r} that the layers start with; raise r or lower it"
        )
    allowed = jnp.asarray(budget.schedule(start, budget.target_r * minis))

    def init(params: Any) -> RankState:
        found = _arrays(params, sites)
        zeros, more = (jax.tree.map(jnp.zeros_like, found) for _ in range(2))  # distinct: a step may donate both
        kept = {path: jnp.ones(site["e"].shape, bool) for path, site in found.items()}
        return RankState(tx.init(params), jnp.zeros((), jnp.int32), zeros, more, kept)

    def update(grads: Any, state: RankState, params: Any = None) -> tuple[Any, RankState]:
        updates, inner = tx.update(grads, state.inner, params)
        step = state.step + 1
        after = _arrays(optax.apply_updates(params, updates), sites)
        fresh = jax.tree.map(lambda w, g: jnp.abs(w * g), after, _arrays(grads, sites))
        counted = step < budget.last  # from the last choice on, PEFT leaves them as they are
        sensitivity, uncertainty = _smoothed(budget, fresh, state, counted)
        scores = {path: _scores(sensitivity[path], uncertainty[path]) for path in sites}
        chosen = _largest(scores, allowed[jnp.minimum(step, budget.total_step)])
        choosing = (step > budget.tinit) & (step < budget.last) & (step % budget.delta_t == 0) | (step == budget.last)
        kept = {path: jnp.where(choosing, chosen[path], state.kept[path]) for path in sites}
        masking = choosing | (step > budget.last)
        masked = _masked(updates, params, {path: ~keep & masking for path, keep in kept.items()})
        return masked, RankState(inner, step, sensitivity, uncertainty, kept)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _sites_of(model: nnx.Module) -> dict[str, Any]:
    """The AdaLoRA layers by path; a stack of them is one entry."""
    found: dict[int, tuple[str, Any]] = {}
    for path, node in walk(model):
        if isinstance(node, MELoRADense) and node.has_budget:
            found.setdefault(id(node), (path_of(path), node))
    if not found:
        raise ValueError('the model has no AdaLoRA layer for a RankBudget; adapt it with variant="adalora"')
    return dict(found.values())


def _arrays(tree: Any, sites: Any) -> dict[str, _Site]:
    """The arrays of the AdaLoRA layers in a tree of the model's variables."""
    found: dict[str, _Site] = {path: {} for path in sites}
    for keypath, leaf in jax.tree_util.tree_leaves_with_path(tree):
        site, _, name = path_of(keypath).rpartition("/")
        if site in found and name in _NAMES:
            found[site][name] = leaf
    return found


def _smoothed(budget: RankBudget, fresh: Any, state: RankState, counted: Array) -> tuple[Any, Any]:
    """Ī and Ū after a step; unchanged unless it is `counted`."""

    def mixed(beta: float, old: Array, new: Array) -> Array:
        return jnp.where(counted, beta * old + (1 - beta) * new, old)

    sensitivity = jax.tree.map(lambda old, new: mixed(budget.beta1, old, new), state.sensitivity, fresh)
    distance = jax.tree.map(lambda new, smooth: jnp.abs(new - smooth), fresh, sensitivity)
    uncertainty = jax.tree.map(lambda old, new: mixed(budget.beta2, old, new), state.uncertainty, distance)
    return sensitivity, uncertainty


def _scores(sensitivity: _Site, uncertainty: _Site) -> Float[Array, "*stack n r"]:
    """S of each latent: a [n i r], b [n r o], e [n r]."""
    entries = {name: sensitivity[name] * uncertainty[name] for name in _NAMES}
    return entries["e"] + entries["a"].mean(-2) + entries["b"].mean(-1)


def _largest(scores: dict[str, Array], allowed: Array) -> dict[str, Array]:
    """Which latents of the whole model the budget keeps: those whose score exceeds the largest one it drops."""
    ranked = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))
    out = ranked.size - allowed
    threshold = jnp.where(out > 0, ranked[jnp.maximum(out, 1) - 1], -jnp.inf)
    return {path: score > threshold for path, score in scores.items()}


def _masked(updates: Any, params: Any, out: dict[str, Array]) -> Any:
    """The updates, with those of masked entries of e replaced by ones that make them zero."""

    def one(keypath: Any, update: Array, parameter: Array) -> Array:
        site, _, name = path_of(keypath).rpartition("/")
        return jnp.where(out[site], -parameter, update) if name == "e" and site in out else update

    return jax.tree_util.tree_map_with_path(one, updates, params)
