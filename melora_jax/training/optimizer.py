"""The optimizer by kind of parameter.

`make_optimizer` is an `optax.multi_transform` over the labels "a", "b", "base", "head" and "frozen". It is an ordinary
optax transformation, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` takes it too.
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
    """A function from any tree of the model's variables to the same tree of labels.

    "b" are factors B, "a" all else of adapters, "base" is what is trained of the base, "head" every other `nnx.Param`,
    "frozen" all the rest.

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
                f"{name} is no variable of the model that the optimizer was made for; call make_optimizer on this model"
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
    """AdamW with one learning rate for A, B and the head each; the frozen base gets no update and no state.

    Args:
      model: an adapted model; its variables' paths and types give the labels.
      learning_rate: of A, of the base, and of what has none of its own; a number or an optax schedule.
      head_learning_rate: of `modules_to_save` (the authors take half of `learning_rate`).
      b_learning_rate: of B (LoRA+, arXiv 2402.12354, takes 16 times `learning_rate`).
      weight_decay: decoupled, on everything trained (the authors: 0.01, torch's default).
      b1, b2, eps: Adam's.
      clip_norm: largest global norm of the trainables' gradients together; `None` does not clip.
      rank_budget: how many latents AdaLoRA keeps; needed where the adapters are AdaLoRA's, to be what the paper says.

    Returns:
      An optax transformation for the trainable tree, or for the model's whole tree.

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
    # A whole-tree caller's frozen gradients are zeroed first, so that they do not count in the norm.
    nothing: dict[Hashable, optax.GradientTransformation] = dict.fromkeys(trained, optax.identity())
    without_frozen = optax.multi_transform(nothing | {"frozen": optax.set_to_zero()}, labels)
    return optax.chain(without_frozen, optax.clip_by_global_norm(clip_norm), update)
