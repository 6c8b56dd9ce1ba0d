"""The optimizer: one group of parameters for A, B, the trained part of the base, and the head.

`make_optimizer` returns an `optax.multi_transform` over the labels "a", "b", "base", "head" and "frozen". It is an
ordinary optax transformation, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` accepts it too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import optax
from flax import nnx

from melora_jax.adapters.params import BaseParam, MELoRAParam
from melora_jax.nn.tree import path_of
from melora_jax.training.rank_allocator import RankBudget, within_budget

Label = Literal["a", "b", "base", "head", "frozen"]


def labels_of(model: nnx.Module) -> Callable[[Any], Any]:
    """A function that maps any tree of the model's variables to a tree of their labels.

    Factors B are labelled "b", an adapter's other parameters "a", trained parameters of the base "base", every other
    `nnx.Param` "head", and the rest "frozen".

    Raises:
      ValueError: when it is called with a tree that has a variable of another model.

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> layer = MELoRADense(4, 6, n=2, rngs=nnx.Rngs(0))
    >>> nnx.to_pure_dict(labels_of(layer)(nnx.state(layer, nnx.Param)))
    {'a': 'a', 'b': 'b'}
    """
    variables = nnx.to_flat_state(nnx.state(model))
    known: dict[str, Label] = {path_of(path): _label(path_of(path), variable) for path, variable in variables}

    def label(path: Any, _: Any) -> Label:
        name = path_of(path)
        if name not in known:
            raise ValueError(
                f"{name} is not a variable of the model that the optimizer was made for; call make_optimizer on this "
                "model"
            )
        return known[name]

    return lambda tree: jax.tree_util.tree_map_with_path(label, tree)


def _label(path: str, variable: Any) -> Label:
    if isinstance(variable, MELoRAParam):
        return "b" if path.rpartition("/")[2] == "b" else "a"  # DoRA's norms and AdaLoRA's diagonal too
    if isinstance(variable, BaseParam):
        return "base"
    return "head" if isinstance(variable, nnx.Param) else "frozen"


def make_optimizer(
    model: nnx.Module,
    learning_rate: optax.ScalarOrSchedule,
    *,
    head_learning_rate: optax.ScalarOrSchedule | None = None,
    b_learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    rank_budget: RankBudget | None = None,
) -> optax.GradientTransformation:
    """AdamW with separate learning rates for A, B and the head; the frozen base gets neither updates nor state.

    Args:
      model: an adapted model. The paths and types of its variables give the labels.
      learning_rate: for A, for trained parameters of the base, and for B and the head unless they have their own; a
        number or an optax schedule of the step.
      head_learning_rate: for `modules_to_save`. MELoRA's authors use half of `learning_rate`.
      b_learning_rate: for B. LoRA+ (arXiv 2402.12354) uses 16 times `learning_rate`.
      weight_decay: decoupled, on everything that is trained. MELoRA's authors use 0.01, torch's default.
      b1, b2, eps: Adam's.
      clip_norm: the largest global norm of all trained parameters' gradients; `None` does not clip.
      rank_budget: how many latents AdaLoRA keeps. Without it, AdaLoRA layers keep their full rank.

    Returns:
      An optax transformation for the trainable tree, or for the model's whole tree.

    Raises:
      ValueError: `rank_budget` for a model without AdaLoRA layers, or with a target above their rank.

    Source: AdamW (arXiv 1711.05101).

    >>> from melora_jax.adapters.melora import MELoRADense
    >>> layer = MELoRADense(4, 6, n=2, rngs=nnx.Rngs(0))
    >>> tx = make_optimizer(layer, 1e-3, head_learning_rate=5e-4)
    >>> optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    """
    labels = labels_of(model)

    def adamw(rate: optax.ScalarOrSchedule | None) -> optax.GradientTransformation:
        rate = learning_rate if rate is None else rate
        return optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)

    trained: dict[Hashable, optax.GradientTransformation] = {
        "a": adamw(None),
        "b": adamw(b_learning_rate),
        "head": adamw(head_learning_rate),
        "frozen": optax.set_to_zero(),
    }
    if nnx.to_flat_state(nnx.state(model, BaseParam)):
        trained["base"] = adamw(None)
    update = optax.multi_transform(trained, labels)
    if rank_budget is not None:
        update = within_budget(model, update, rank_budget)
    if clip_norm is None:
        return update
    # If the caller passes the whole tree, the frozen part's gradients must not count in the norm.
    nothing: dict[Hashable, optax.GradientTransformation] = dict.fromkeys(trained, optax.identity())
    without_frozen = optax.multi_transform(nothing | {"frozen": optax.set_to_zero()}, labels)
    return optax.chain(without_frozen, optax.clip_by_global_norm(clip_norm), update)
