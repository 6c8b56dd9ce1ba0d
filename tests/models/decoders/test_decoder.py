"""Decoders against torch transformers; padding, packing, rematerialisation, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.models import model_from_config
from tests.support.decoder_fixtures import (
    CONFIGS,
    FAMILIES,
    NAMES,
    TOKENS,
    apply,
    checkpoint,
    padded,
    random_decoder,
    token_ids,
    torch_decoder,
    torch_run,
)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(tmp_path, name):
    reference, info = torch_decoder(checkpoint(tmp_path, name))
    assert not any(info.values()), info
    model = mj.from_pretrained(tmp_path, task="causal-lm")
    ids, mask, positions = padded()
    expected = torch_run(reference, ids, mask, positions)
    found = np.asarray(apply(model, ids, mask))
    assert found.shape == (3, TOKENS, 101)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)
    without = torch_run(reference, token_ids())
    np.testing.assert_allclose(apply(model, token_ids()), without, rtol=0, atol=1e-5)
    assert np.ptp(without, axis=(0, 1)).mean() > 1


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_hidden_states_equal_those_of_transformers(tmp_path, name):
    reference, info = torch_decoder(checkpoint(tmp_path, name), "encoder")
    model = mj.from_pretrained(tmp_path, task="encoder")
    assert set(info["unexpected_keys"]) == {tensor for tensor, _ in model.load_report.ignored}
    ids, mask, positions = padded()
    found, expected = np.asarray(model(ids, mask)), torch_run(reference, ids, mask, positions)
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "smollm2", "gemma2"])
def test_the_head_is_applied_to_the_hidden_states(name):
    model = random_decoder(name)
    ids, mask, _ = padded()
    hidden = model.hidden(ids, mask)
    assert hidden.shape == (3, TOKENS, 42)
    np.testing.assert_array_equal(model.logits(hidden), model(ids, mask))
    head = (
        np.asarray(model.lm_head.kernel[...]) if name == "llama" else np.asarray(model.model.embed_tokens.embedding).T
    )
    expected = np.asarray(hidden) @ head
    if name == "gemma2":
        expected = 2.9 * np.tanh(expected / 2.9)
    np.testing.assert_allclose(model.logits(hidden), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing(name):
    model = random_decoder(name)
    ids, mask, _ = padded()
    found = np.asarray(apply(model, ids, mask))
    tokens = [row[kept == 1] for row, kept in zip(ids, mask, strict=True)]
    alone = np.asarray(apply(model, np.stack([np.pad(row, (0, TOKENS - len(row))) for row in tokens])))
    for row, kept in enumerate(mask):
        np.testing.assert_allclose(found[row][kept == 1], alone[row, : kept.sum()], rtol=0, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_examples_are_as_alone(name):
    """The first row holds three examples, the others one each and what no example may see."""
    model = random_decoder(name)
    ids, segments = np.full((4, TOKENS), 9, np.int32), np.zeros((4, TOKENS), np.int32)
    examples = np.split(token_ids(1)[0], [7, 11])
    ids[0], segments[0] = np.concatenate(examples), np.repeat([5, 2, 3], [7, 4, 8])
    for row, example in enumerate(examples, 1):
        ids[row, : len(example)] = example
        segments[row, : len(example)] = 1
    logits = np.asarray(apply(model, ids, None, None, segments))
    packed = np.split(logits[0], [7, 11])
    for row, example in enumerate(packed, 1):
        np.testing.assert_allclose(example, logits[row, : len(example)], rtol=0, atol=5e-6)
    np.testing.assert_allclose(packed[0], np.asarray(apply(model, token_ids(1)))[0, :7], rtol=0, atol=5e-6)


def test_padding_between_packed_examples_changes_nothing():
    model, segments = random_decoder("gemma3_text"), np.repeat([[5, 2, 3]], [7, 4, 8], axis=1)
    mask = np.repeat([[1, 0, 1]], [7, 4, 8], axis=1)
    found = np.asarray(apply(model, token_ids(1), mask, None, segments))[0]
    alone = np.asarray(apply(model, np.roll(token_ids(1), 8, axis=1)))[0, :8]
    np.testing.assert_allclose(found[11:], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
def test_positions_may_start_anywhere(name):
    model = random_decoder(name)
    ids = token_ids()
    shifted = np.arange(TOKENS)[None] + 31
    expected = np.asarray(apply(model, ids))
    np.testing.assert_allclose(apply(model, ids, None, shifted), expected, rtol=0, atol=1e-5)
    gapped = shifted + 40 * (np.arange(TOKENS) > 9)
    assert np.abs(np.asarray(apply(model, ids, None, gapped)) - expected)[:, 10:].max() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_the_future_and_what_lies_behind_the_window_are_not_seen(name):
    """A token's change moves the logits from its own place on, and in a stack of windows no further than they reach."""
    model = random_decoder(name)
    ids = token_ids(1)
    other = ids.copy()
    other[0, 3] = 5 if ids[0, 3] != 5 else 6
    moved = np.abs(np.asarray(apply(model, other)) - np.asarray(apply(model, ids))).max(axis=-1)[0] > 1e-6
    assert not moved[:3].any()
    # two layers that each see 4 tokens back
    last = 3 + 2 * 4 if name == "mistral" else TOKENS - 1
    assert moved[3 : last + 1].all()
    assert not moved[last + 1 :].any()


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
    ids, mask, _ = padded()
    for name in ("llama", "gemma2"):
        exact = np.asarray(apply(random_decoder(name), ids, mask))
        model = random_decoder(name, dtype="bfloat16")
        assert model.hidden(ids, mask).dtype == jnp.bfloat16
        found = apply(model, ids, mask)
        assert found.dtype == jnp.float32
        # 8 bits of mantissa through two layers
        assert np.abs(np.asarray(found) - exact)[mask == 1].max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["smollm2", "gemma2"])
def test_dropout_is_of_the_attention_probabilities(monkeypatch, name):
    sites = []
    monkeypatch.setattr(
        "melora_jax.models.decoders.masks.dropout", lambda x, rate, path: sites.append((path, rate)) or x
    )
    random_decoder(name, {"attention_dropout": 0.25})(token_ids())
    assert sites == [(f"model/layers/{layer}/self_attn", 0.25) for layer in range(2)]


def test_dropout_follows_the_key():
    model, ids = random_decoder("qwen2", {"attention_dropout": 0.25}), token_ids()
    first, again, other = (apply(model, ids, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    np.testing.assert_allclose(apply(model, ids), apply(random_decoder("qwen2"), ids), rtol=0, atol=5e-6)


def adapted_gradient(name: str, remat: str, rate: float) -> tuple[Callable, nnx.State]:
    """The gradient of a loss by the adapters of a one-layer model, with dropout in attention and adapters; and they."""
    changes = {"attention_dropout": rate, "layer_types": ["full_attention"], "num_hidden_layers": 1}
    model = random_decoder(name, changes, remat=remat)
    config = mj.MELoRAConfig(n=2, r=1, dropout=rate, targets=["q_proj", "down_proj"])
    mj.adapt(model, config, rngs=nnx.Rngs(3))
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    ids = token_ids(2, 11)

    def loss(trainable, key):
        logits = nnx.merge(graphdef, trainable, rest, copy=True)(ids, key=key)
        return jax.nn.log_softmax(logits)[..., 7].mean()

    return jax.grad(loss), trainable


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate", "remat"), [("smollm2", 0.0, "dots"), ("gemma2", 0.25, "full")])
def test_rematerialised_layers_have_the_same_gradients(name, rate, remat):
    key, found = jax.random.key(5), []
    for choice in ("none", remat):
        gradient, trainable = adapted_gradient(name, choice, rate)
        found.append(jax.tree.leaves(jax.jit(gradient)(trainable, key)))
    largest = max(np.abs(leaf).max() for leaf in found[0])
    for expected, leaf in zip(*found, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=5e-5 * largest)


def test_remat_computes_again_what_it_says():
    products = {}
    for remat in ("none", "dots", "full"):
        gradient, trainable = adapted_gradient("smollm2", remat, 0.0)
        products[remat] = str(jax.make_jaxpr(gradient)(trainable, jax.random.key(5))).count("dot_general")
    # "full" computes every product of a layer again, "dots" keeps those with kernels
    assert products["none"] < products["dots"] < products["full"]


def test_random_models_start_as_in_hugging_face():
    small = {"vocab_size": 1009, "num_hidden_layers": 1}
    model = model_from_config(CONFIGS["llama"] | small, task="causal-lm")
    assert abs(np.asarray(model.model.embed_tokens.embedding).std() - 0.3) < 0.02
    assert abs(np.asarray(model.model.layers[0].mlp.up_proj.kernel[...]).std() - 0.3) < 0.03
    assert (np.asarray(model.model.norm.scale) == 1).all()
    assert (np.asarray(model_from_config(CONFIGS["gemma2"] | small, task="causal-lm").model.norm.scale) == 0).all()


def test_layers_of_one_type_are_equal_modules_so_that_they_can_be_stacked():
    layers = random_decoder("gemma3_text", {"num_hidden_layers": 3}).model.layers
    assert nnx.graphdef(layers[0]) == nnx.graphdef(layers[2])
    assert nnx.graphdef(layers[0]) != nnx.graphdef(layers[1])


BAD_INPUTS = {
    "input_ids hold 0 tokens a row": {"input_ids": np.ones((2, 0), int)},
    "input_ids range from 1 to 101, vocab_size is 101; use the tokenizer": {"input_ids": np.array([[1, 101]])},
    "input_ids are int32[3]; give whole numbers of shape [batch, tokens]": {"input_ids": np.ones(3, np.int32)},
    "attention_mask have shape [2, 4], input_ids [2, 3]": {"attention_mask": np.ones((2, 4))},
    "position_ids have shape [1, 4], input_ids [1, 3]": {"position_ids": np.ones((1, 4), int)},
    "position_ids have shape [3, 3], input_ids [2, 3]": {"position_ids": np.ones((3, 3), int)},
    "position_ids are float32": {"position_ids": np.ones((2, 3), np.float32)},
    "segment_ids have shape [1, 3], input_ids [2, 3]": {"segment_ids": np.ones((1, 3), int)},
    "segment_ids are bool": {"segment_ids": np.ones((2, 3), bool)},
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs_are_refused(message):
    model = random_decoder("llama")
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**({"input_ids": np.ones((2, 3), int)} | BAD_INPUTS[message]))
