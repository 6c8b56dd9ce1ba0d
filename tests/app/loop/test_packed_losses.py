"""Packed equals unpacked: an example has the same loss at every token, whatever stands beside it in its row."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from melora_jax.models import model_from_config
from melora_jax.training import chunked_cross_entropy
from tests.support.decoder_fixtures import CONFIGS, VOCAB
from train.data.batching import BatchRows
from train.data.packing import PackPlan, make_token_batch
from train.data.tokens import Examples

WIDTH = 23


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 14, 17)
    return Examples(
        [rng.integers(3, VOCAB, length).astype(np.int32) for length in lengths],
        [rng.random(length) < 0.7 for length in lengths],
    )


def per_token(model, batch):
    """Sum, losses of tokens [b, t], and the gradient of the sum with respect to the model's parameters."""
    graphdef, parameters = nnx.split(model)

    def loss(parameters):
        current = nnx.merge(graphdef, parameters, copy=True)
        hidden = current.hidden(*(batch[k] for k in ("input_ids", "attention_mask", "position_ids", "segment_ids")))
        return chunked_cross_entropy(hidden, current.logits, batch["labels"], batch["weights"], chunk=40)

    (total, losses), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(parameters)
    return total, np.asarray(losses), gradient


@pytest.mark.parametrize("family", ["llama", "smollm2", "mistral", "gemma2"])
def test_packed_examples_have_the_losses_and_gradients_of_single_ones(family, examples):
    model = model_from_config(CONFIGS[family], task="causal-lm", rngs=nnx.Rngs(0))
    plan = PackPlan(examples.lengths, 40, WIDTH, seed=0)
    assert plan.steps_per_epoch == 1
    packed = plan.batch(0)
    alone = make_token_batch(examples, BatchRows(np.arange(len(examples.input_ids)), WIDTH), pad_id=0)
    together = make_token_batch(examples, packed, pad_id=0)
    wanted, wanted_losses, wanted_gradient = per_token(model, alone)
    total, losses, gradient = per_token(model, together)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    for row, group in enumerate(packed.rows):
        for segment, example in enumerate(group, start=1):
            places = together["segment_ids"][row] == segment
            length = int(examples.lengths[example])
            np.testing.assert_allclose(
                losses[row, places][:-1], wanted_losses[example, : length - 1], rtol=1e-5, atol=1e-5
            )
    floats = functools.partial(jax.tree.leaves, is_leaf=lambda x: hasattr(x, "dtype"))
    for ours, theirs in zip(floats(gradient), floats(wanted_gradient), strict=True):
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, float(abs(theirs).max())))
