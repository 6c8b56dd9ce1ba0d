"""A GPU computes what the CPU does: JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.models import model_from_config
from tests.support.tiny import stirred
from tests.support.tiny_run import DECODER_SIZES

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {"strategy": "packed"},
    "batched": {"strategy": "batched"},
    "merged": {"strategy": "merged"},
    "auto": {"strategy": "auto", "mixer": "all"},
    "dora": {"variant": "dora"},
}


def trained(device: jax.Device, dtype: str, **settings: Any) -> tuple[list[float], list[np.ndarray]]:
    """The losses of five steps of a tiny Llama on a device, and its factors after them."""
    with jax.default_device(device):
        model = model_from_config(DECODER_SIZES, task="causal-lm", rngs=nnx.Rngs(3), dtype=dtype)
        config = mj.MELoRAConfig(n=2, r=2, targets=["q_proj", "up_proj"], **settings)
        mj.adapt(model, config, rngs=nnx.Rngs(1))
        stirred(model)
        ids = jnp.asarray(np.random.default_rng(0).integers(0, 17, (4, 40)), jnp.int32)
        tx = mj.make_optimizer(model, 1e-2)
        step = mj.make_train_step(model, tx, lambda model, ids: (model(ids).astype(jnp.float32) ** 2).mean())
        state, frozen = mj.train_state(model, tx)
        losses = []
        for number in range(5):
            state, metrics = step(state, frozen, ids, jax.random.key(number))
            losses.append(float(metrics["loss"]))
        return losses, [np.asarray(leaf) for leaf in jax.tree.leaves(state.trainable)]


@pytest.mark.parametrize("name", SETTINGS)
def test_training_in_float32_is_that_of_the_cpu(name: str) -> None:
    with jax.default_matmul_precision("highest"):
        here, there = (trained(jax.devices(kind)[0], "float32", **SETTINGS[name]) for kind in ("gpu", "cpu"))
    np.testing.assert_allclose(here[0], there[0], rtol=1e-4)
    for ours, theirs in zip(here[1], there[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_training_in_bfloat16_is_near_that_in_float32() -> None:
    """There our attention takes cuDNN's kernel where it can."""
    half, whole = (trained(jax.devices("gpu")[0], dtype) for dtype in ("bfloat16", "float32"))
    np.testing.assert_allclose(half[0], whole[0], rtol=5e-2)
