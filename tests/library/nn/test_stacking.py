"""Stacked layers: the same model to whoever uses it, in fewer and larger arrays."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.checkpoints import spectra
from melora_jax.models import model_from_config
from melora_jax.nn import unstack_layers
from melora_jax.nn.scan_layers import LayerRun
from melora_jax.nn.tree import walk
from tests.support.decoder_fixtures import random_decoder, token_ids

pytestmark = pytest.mark.slow

KEY = jax.random.key(5)
ENCODER = {
    "vocab_size": 41,
    "hidden_size": 12,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 14,
    "max_position_embeddings": 23,
    "initializer_range": 0.1,
}
DECODERS = {
    "llama": {"num_hidden_layers": 5, "attention_dropout": 0.2},
    "gemma2": {"num_hidden_layers": 5},  # local and global layers in turn
    "qwen2": {"num_hidden_layers": 5, "max_window_layers": 2},
}


def decoder(name: str, **options: Any) -> Any:
    config = random_decoder(name).config.to_dict() | DECODERS[name]
    config.pop("layer_types", None)
    config["initializer_range"] = 0.1  # keeps rounding from growing over the layers
    return model_from_config(config, task="causal-lm", **options)


def encoder() -> Any:
    return model_from_config({"model_type": "bert", **ENCODER}, num_labels=4)


def adapted(model: Any, **changes: Any) -> Any:
    """The model with adapters whose B is not zero."""
    config = mj.MELoRAConfig(
        **({"n": 2, "r": (1, 2), "alpha": 2.0, "dropout": 0.3, "targets": ["q_proj", "down_proj"]} | changes)
    )
    mj.adapt(model, config, rngs=nnx.Rngs(3))
    drawn = np.random.default_rng(9)
    factors = nnx.state(model, mj.MELoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.05 * drawn.standard_normal(leaf.shape).astype("f"), factors))
    return model


def outputs(model: Any, ids: Any, key: Any = None) -> np.ndarray:
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids, key: nnx.merge(graphdef, state, copy=True)(ids, key=key))
    return np.asarray(run(state, ids, key))


def same_trees(one: nnx.Module, other: nnx.Module) -> None:
    assert nnx.graphdef(one) == nnx.graphdef(other)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", "5 layers in 1 scanned run(s): 0-4 (5 × 1)"),
        ("gemma2", "5 layers in 1 scanned run(s): 0-3 (2 × 2); alone: 4"),
        ("qwen2", "5 layers in 2 scanned run(s): 0-1 (2 × 1), 2-4 (3 × 1)"),
    ],
)
def test_a_decoder_computes_the_same_with_dropout(name: str, said: str) -> None:
    plain, model = adapted(decoder(name)), adapted(decoder(name))
    assert str(mj.stack_layers(model)) == said
    ids = token_ids()
    expected = outputs(plain, ids, KEY)
    np.testing.assert_allclose(outputs(model, ids, KEY), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert not np.array_equal(expected, outputs(plain, ids, jax.random.key(6)))
    same_trees(unstack_layers(model), plain)


def test_an_encoder_computes_the_same_and_draws_the_same_masks_twice_in_one_pass() -> None:
    plain, model = (
        adapted(encoder(), targets=["query", "dense"], exclude=["pooler.dense"]),
        adapted(encoder(), targets=["query", "dense"], exclude=["pooler.dense"]),
    )
    mj.stack_layers(model)
    ids = np.random.default_rng(1).integers(1, 41, (3, 7))

    def both(model: Any) -> list[Any]:
        with mj.dropout_key(KEY):
            return [model(ids), model(ids)]

    first, second = both(plain)
    assert np.abs(first - second).max() > 1e-3
    for found, expected in zip(both(model), (first, second), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_key_entered_around_a_jitted_stack_is_refused() -> None:
    model = adapted(decoder("llama"))
    mj.stack_layers(model)
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, ids: nnx.merge(graphdef, state, copy=True)(ids))
    with pytest.raises(ValueError, match="the key was entered around a jitted"), mj.dropout_key(KEY):
        run(state, token_ids())


def test_runs_break_where_layers_differ() -> None:
    model = adapted(decoder("llama"), layers=[0, 1, 3], rank_pattern={"layers/1/self_attn/q_proj": 2})
    assert str(mj.stack_layers(model)) == "5 layers in 0 scanned run(s): none; alone: 0, 1, 2, 3, 4"
    model = adapted(decoder("llama"), layers=[0, 2, 4])
    assert str(mj.stack_layers(model)) == "5 layers in 1 scanned run(s): 0-3 (2 × 2); alone: 4"


def test_layers_that_share_a_variable_stay_alone() -> None:
    model = decoder("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert mj.stack_layers(model).single == (0, 1)
    assert model.model.layers[1].mlp is model.model.layers[0].mlp


@pytest.mark.parametrize("remat", ["none", "full"])
def test_training_steps_are_the_same(remat: str) -> None:
    """Losses, gradients (by Adam's first step) and factors, with dropout and accumulation; the base is not touched."""
    ids = token_ids()

    def loss(model: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch)[:, :-1], batch[:, 1:]).mean()

    def trained(model: Any) -> tuple[list[float], Any]:
        tx = mj.make_optimizer(model, 1e-3, clip_norm=1.0)
        step = mj.make_train_step(model, tx, loss, accumulate=3)
        state, frozen = mj.train_state(model, tx)
        before = jax.tree.map(np.array, frozen)
        losses = []
        for _ in range(3):
            state, metrics = step(state, frozen, ids, KEY)
            losses += [float(metrics["loss"]), float(metrics["grad_norm"])]
        jax.tree.map(np.testing.assert_array_equal, frozen, before)
        nnx.update(model, state.trainable)
        return losses, unstack_layers(model)

    stacked = adapted(decoder("llama", remat=remat))
    mj.stack_layers(stacked)
    expected, plain = trained(adapted(decoder("llama")))
    found, model = trained(stacked)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    compare = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(compare, nnx.state(model, nnx.Param), nnx.state(plain, nnx.Param))


def test_generation_is_the_same() -> None:
    plain, model = adapted(decoder("gemma2")), adapted(decoder("gemma2"))
    mj.stack_layers(model)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    expected = mj.generate(plain, prompts, max_new_tokens=9, eos_token_id=())
    np.testing.assert_array_equal(
        mj.generate(model, prompts, max_new_tokens=9, eos_token_id=()).tokens, expected.tokens
    )


def test_what_is_saved_merged_and_described_is_the_same(tmp_path: Any) -> None:
    plain = adapted(encoder(), modules_to_save=["classifier"], targets=["query", "dense"])
    model = adapted(encoder(), modules_to_save=["classifier"], targets=["query", "dense"])
    mj.stack_layers(model)
    assert mj.describe(model) == mj.describe(plain)
    for path, values in spectra(plain).items():
        np.testing.assert_array_equal(spectra(model)[path], values)
    for name, write in {"own": mj.save_adapter, "peft": mj.export_peft}.items():
        for kind, source in {"plain": plain, "stacked": model}.items():
            write(source, tmp_path / f"{name}-{kind}")
        for file in (tmp_path / f"{name}-plain").iterdir():
            assert (tmp_path / f"{name}-stacked" / file.name).read_bytes() == file.read_bytes()
    same_trees(mj.merge(model), mj.merge(plain))
    same_trees(mj.unwrap(model), mj.unwrap(plain))
    stacked = mj.merge(model)
    mj.stack_layers(stacked)
    for kind, source in {"plain": mj.merge(plain), "stacked": stacked}.items():
        mj.save_pretrained(source, tmp_path / kind)
    name = "model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "stacked" / name).read_bytes()


def test_what_belongs_before_stacking_is_refused_after_it(tmp_path: Any) -> None:
    model = adapted(decoder("llama"))
    mj.save_adapter(model, tmp_path / "adapter")
    mj.stack_layers(model)
    with pytest.raises(ValueError, match=r"stacked already; unstack_layers\(model\) takes them apart"):
        mj.stack_layers(model)
    with pytest.raises(ValueError, match=r"layers are stacked; load an adapter before, or call unstack_layers"):
        mj.load_adapter(model, tmp_path / "adapter")
    plain = decoder("llama")
    mj.stack_layers(plain)
    with pytest.raises(ValueError, match="layers are stacked; adapt it first"):
        mj.adapt(plain, mj.MELoRAConfig(n=2, targets=["q_proj"]), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Linear has no layers to stack"):
        mj.stack_layers(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_abstract_models_stack_too_and_the_program_does_not_grow_with_depth() -> None:
    def size(layers: int) -> int:
        config = decoder("llama").config.to_dict() | {"num_hidden_layers": layers}
        model = nnx.eval_shape(lambda: adapted_abstract(config))
        mj.stack_layers(model)
        assert any(isinstance(node, LayerRun) and node.repeats == layers for _, node in walk(model))
        graphdef, state = nnx.split(model)
        run = jax.jit(lambda state, ids: nnx.merge(graphdef, state, copy=True)(ids))
        return len(run.lower(state, jax.ShapeDtypeStruct((2, 7), jnp.int32)).as_text().splitlines())

    assert size(8) == size(3)


def adapted_abstract(config: Any) -> Any:
    model = model_from_config(config, task="causal-lm")
    mj.adapt(model, mj.MELoRAConfig(n=2, targets="all-linear"), rngs=nnx.Rngs(0))
    return model
