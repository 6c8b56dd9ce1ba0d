"""How long a deep model's training step takes to compile, from shapes alone: it needs no weights and no memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import melora_jax as mj
from train.lab.bench.models import LLAMA_2_7B, abstract
from train.loop.losses import make_loss, measurer

LENGTH = 512


def compile_rows(depths: Sequence[int], say: Callable[[str], None], sizes: dict[str, Any] | None = None) -> list[Any]:
    """A row for each depth, layers stacked and not: seconds of tracing and compiling, lines of HLO.

    Args:
      depths: numbers of layers.
      say: receives a message before each row.
      sizes: the config.json without its depth; by default Llama-2-7B's.
    """
    rows = []
    for depth in depths:
        for stacked in (True, False):
            say(f"compiling {depth} layers, {'stacked' if stacked else 'one by one'} ...")
            rows.append(_row((sizes or LLAMA_2_7B) | {"num_hidden_layers": depth}, stacked))
    return rows


def _row(config: dict[str, Any], stacked: bool) -> dict[str, Any]:
    """One step: MELoRA n=8 r=8 on q_proj and v_proj, bfloat16, each layer rematerialised, one row of tokens."""

    def adapted(model: Any) -> Any:
        mj.adapt(model, mj.MELoRAConfig(n=8, r=8, targets=("q_proj", "v_proj")), rngs=nnx.Rngs(0))
        if stacked:
            mj.stack_layers(model)
        return model

    model = nnx.eval_shape(adapted, abstract(config, "causal-lm", "bfloat16", "full"))
    tx = mj.make_optimizer(model, 1e-4)
    _, trainable, frozen, host = nnx.split(model, nnx.Param, mj.FrozenParam, ...)
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = mj.TrainState(number, trainable, jax.eval_shape(tx.init, trainable), host)
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    batch = {"input_ids": ids, "labels": ids, "weights": jax.ShapeDtypeStruct((1, LENGTH), jnp.float32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    began = time.perf_counter()
    step = mj.make_train_step(model, tx, make_loss(measurer("causal-lm", chunk=1024)))
    lowered = step.lower(state, frozen, batch, key)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    return {
        "depth": config["num_hidden_layers"],
        "stacked": stacked,
        "trace_seconds": traced - began,
        "compile_seconds": done - traced,
        "hlo_lines": len(str(compiled.as_text()).splitlines()),
    }
