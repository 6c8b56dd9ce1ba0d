"""Models of any size for `python -m train bench`, as shapes or with random weights, without a download."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax.models import abstract_model

Task = Literal["classification", "causal-lm"]
TASKS = {"classification": "sequence-classification", "causal-lm": "causal-lm"}
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


def sizes_of(task: Task, width: int, depth: int) -> dict[str, Any]:
    """The config.json of a BERT or Llama with hidden size `width` and `depth` layers."""
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "max_position_embeddings": 4096}
    if task == "classification":
        inner = {"intermediate_size": 4 * width, "num_attention_heads": max(1, width // 64)}
        return {"model_type": "bert", "vocab_size": 30_522, **sizes, **inner}
    inner = {"intermediate_size": 3 * width, "num_attention_heads": max(1, width // 64)}
    return {"model_type": "llama", "vocab_size": 8192, **sizes, **inner}


def abstract(config: dict[str, Any], task: Task, dtype: str, remat: str = "none") -> Any:
    """The model of a config.json, with shapes in place of arrays."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        labels = 2 if task == "classification" else None
        return abstract_model(folder, task=TASKS[task], num_labels=labels, dtype=dtype, remat=remat)


def random_model(task: Task, width: int, depth: int, dtype: str) -> Any:
    """The model with every weight drawn from N(0, 0.02²)."""
    graphdef, shapes = nnx.split(abstract(sizes_of(task, width, depth), task, dtype))
    rng = np.random.default_rng(0)

    def drawn(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(0.02 * rng.standard_normal(shape.shape, np.float32), shape.dtype)

    return nnx.merge(graphdef, jax.tree.map(drawn, shapes))
