"""Tiny runs of an encoder and a decoder on meshes, and how far they are from those on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import melora_jax as mj
from melora_jax.models import model_from_config, save_pretrained

STEPS, ROWS, TOKENS, VOCAB = 5, 16, 7, 56
ENCODER = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "intermediate_size": 88,
    "max_position_embeddings": 13,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
    "initializer_range": 0.1,
}
DECODER = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "max_position_embeddings": 13,
    "attention_dropout": 0.2,
    "attention_bias": True,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
DEEP = DECODER | {"num_hidden_layers": 3}
TASKS = {"bert": ("sequence-classification", 3), "llama": ("causal-lm", None), "deep": ("causal-lm", None)}
TARGETS = {
    "bert": r".*/(query|key|value|dense)",
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
OTHER_N = {"bert": {}, "llama": {"k_proj": 4, "v_proj": 4}}
WHOLE: dict[str, Any] = {"targets": [], "layers": None, "n_pattern": {}}
HEADS = {"bert": "classifier", "llama": "lm_head"}
for table in (TARGETS, OTHER_N, HEADS):
    table["deep"] = table["llama"]  # the same, three layers deep, and stacked


class Run(NamedTuple):
    """What five steps gave: losses, and the trainables and optimizer state (the moments of the gradients) by path."""

    losses: np.ndarray
    state: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]
    placed: dict[str, str]


def write_checkpoints(folder: Path) -> None:
    for number, (name, config) in enumerate({"bert": ENCODER, "llama": DECODER, "deep": DEEP}.items()):
        task = "encoder" if name == "bert" else "causal-lm"
        save_pretrained(model_from_config(config, task=task, rngs=nnx.Rngs(number)), folder / name)


def batch_of(family: str, step: int) -> dict[str, np.ndarray]:
    """Rows of which the last two weigh nothing, as in a last batch that is not full."""
    rng = np.random.default_rng(step)
    ids = rng.integers(1, VOCAB, (ROWS, TOKENS)).astype(np.int32)
    batch = {"input_ids": ids, "weight": (np.arange(ROWS) < ROWS - 2).astype(np.float32)}
    if family == "bert":
        mask = (np.arange(TOKENS) < rng.integers(2, TOKENS + 1, (ROWS, 1))).astype(np.int32)
        return batch | {"attention_mask": mask, "labels": rng.integers(0, 3, ROWS).astype(np.int32)}
    return batch | {"labels": np.roll(ids, -1, axis=1)}


def loss(model: Any, batch: Any) -> Any:
    logits = model(batch["input_ids"], batch.get("attention_mask"))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    losses = losses if losses.ndim == 1 else losses.mean(-1)
    return (losses * batch["weight"]).sum() / batch["weight"].sum(), {"weight": batch["weight"].sum()}


def adapted(folder: Path, family: str, mesh: Mesh | None, qtype: Any = None, **changes: Any) -> Any:
    """The model with adapters of n=8 (or as `changes` say) that are not zero; its base quantised to `qtype`, if any."""
    task, labels = TASKS[family]
    model = mj.from_pretrained(folder / family, task=task, num_labels=labels, mesh=mesh)
    if qtype:
        mj.quantize(model, qtype)
    settings: dict[str, Any] = {
        "n": 8,
        "r": 2,
        "dropout": 0.2,
        "targets": TARGETS[family],
        "n_pattern": OTHER_N[family],
    }
    settings["layers"] = [0, 1, 2] if family == "deep" else [0]
    config = mj.MELoRAConfig(**(settings | {"modules_to_save": [HEADS[family]]} | changes))
    mj.adapt(model, config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(3)
    for _, variable in nnx.to_flat_state(nnx.state(model, mj.MELoRAParam)):
        drawn = rng.normal(size=variable.shape).astype(np.float32) * 0.1
        variable.set_value(jax.device_put(drawn, variable[...].sharding))
    return model


def train(folder: Path, family: str, mesh: Mesh | None, accumulate: int = 2, tx: Any = None, **changes: Any) -> Run:
    """Five steps by Adam, or by `tx`."""
    model = adapted(folder, family, mesh, **changes)
    if family == "deep":
        mj.stack_layers(model)
    tx = tx or mj.make_optimizer(model, 1e-3, head_learning_rate=1e-3, clip_norm=1.0)
    step = mj.make_train_step(model, tx, loss, accumulate=accumulate, mesh=mesh)
    state, frozen = mj.train_state(model, tx)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, frozen, batch_of(family, number), jax.random.key(5))
        losses.append([metrics["loss"], metrics["grad_norm"]])
    named = jax.tree_util.tree_leaves_with_path((state.trainable, state.opt_state))
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in named}
    placed = {
        jax.tree_util.keystr(p, simple=True, separator="/"): str(getattr(leaf.sharding, "spec", ""))
        for p, leaf in named
    }
    return Run(np.array(losses), arrays, hosted(frozen), placed)


def hosted(state: Any) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, over the largest magnitude."""
    return float(abs(np.float64(one) - other).max() / max(abs(np.float64(other)).max(), 1e-30))


def compare(run: Run, alone: Run) -> dict[str, Any]:
    # The gradient of a BERT's key bias is rounding alone, of which Adam makes steps of full size.
    kept = {path: value for path, value in run.state.items() if value.ndim and "/self/key/bias" not in path}
    worst = {path: distance(value, alone.state[path]) for path, value in kept.items()}
    path = max(worst, key=lambda path: worst[path])
    untouched = all(np.array_equal(value, alone.frozen[path]) for path, value in run.frozen.items())
    losses = distance(run.losses, alone.losses)
    return {"losses": losses, "state": worst[path], "at": path, "untouched": untouched}
