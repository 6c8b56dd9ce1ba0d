"""A quantised base against NumPy, its training, its merge, its size, and what it refuses."""

from __future__ import annotations

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.models.auto import model_from_config
from melora_jax.nn.quantized import QuantizedLinear
from tests.support.tiny_run import make_material, recipe
from train.__main__ import main
from train.run_folder.log import read_metrics

D_IN, D_OUT = 192, 20
# QLoRA, appendix E.
NF4_WORDS = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)
NF4 = np.array(NF4_WORDS.split(), np.float32)
SIZES = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 16,
}


def linear(dtype=jnp.float32) -> nnx.Linear:
    layer = nnx.Linear(D_IN, D_OUT, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))
    layer.bias[...] = jax.random.normal(jax.random.key(1), (D_OUT,), dtype)
    return layer


def numpy_dequantized(layer: QuantizedLinear) -> np.ndarray:
    """The kernel that codes and scales stand for."""
    codes, scale = np.asarray(layer.codes[...]).astype(int), np.asarray(layer.scale[...])
    values = NF4[codes] if layer.qtype == "nf4" else codes.astype(np.float32)
    return values * np.repeat(scale, D_IN // len(scale), axis=0)


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_an_adapted_layer_is_numpys_dequantised_one_plus_the_update(qtype):
    layer = QuantizedLinear(linear(), qtype)
    spec = mj.MELoRAConfig(n=4, r=2, targets=["x"]).spec("x")
    adapted = mj.MELoRADense.wrap(layer, spec, path="x", rngs=nnx.Rngs(2))
    adapted.b[...] = jax.random.normal(jax.random.key(3), adapted.b.shape)
    x = np.asarray(jax.random.normal(jax.random.key(4), (3, D_IN)))
    expected = x @ (numpy_dequantized(layer) + np.asarray(adapted.delta())) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(adapted(x), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_each_weight_has_the_nearest_code(qtype):
    """Of the scale that the largest weight of an output, or of a tile of 64 inputs, sets."""
    kernel, layer = np.asarray(linear().kernel[...]), QuantizedLinear(linear(), qtype)
    tiles = kernel.reshape((1 if qtype == "int8" else D_IN // 64), -1, D_OUT)
    scale = np.abs(tiles).max(1, keepdims=True) / (127.5 if qtype == "int8" else 1)
    levels = np.arange(-128, 128) if qtype == "int8" else NF4
    nearest = np.abs(tiles[..., None] - scale[..., None] * levels).min(-1)
    ours = np.abs(kernel - numpy_dequantized(layer)).reshape(tiles.shape)
    np.testing.assert_allclose(ours, nearest, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_pass_through_to_the_input_alone(dtype):
    layer = QuantizedLinear(linear(dtype), "nf4")
    x = jax.random.normal(jax.random.key(4), (3, D_IN), dtype)
    y = jax.random.normal(jax.random.key(5), (3, D_OUT), dtype)
    plain = jax.vjp(lambda x: x @ layer.kernel, x)[1](y)[0]
    ours = jax.vjp(layer, x)[1](y)[0]
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours, plain)


def test_the_kernel_is_not_kept_for_the_backward_pass():
    """Else a 4-bit model would hold all of its kernels in full while it is trained."""
    layer = QuantizedLinear(linear(), "nf4")
    graphdef, state = nnx.split(layer)
    residuals = jax.eval_shape(
        lambda s, x: jax.vjp(lambda x: nnx.merge(graphdef, s)(x), x)[1], state, jnp.ones((3, D_IN))
    )
    floats = [leaf.size for leaf in jax.tree.leaves(residuals) if leaf.dtype == jnp.float32]
    assert max(floats) == 3 * D_OUT  # the scales


def decoder(dtype="float32"):
    return model_from_config(SIZES, task="causal-lm", dtype=dtype, rngs=nnx.Rngs(7))


@pytest.mark.parametrize(("qtype", "bits"), [("int8", 8), ("nf4", 4)])
def test_the_base_takes_so_many_bytes(qtype, bits):
    model = decoder("bfloat16")
    report = mj.quantize(model, qtype)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    assert (report.layers, report.before) == (14, 2 * weights)
    # one scale an output; or one a tile of 64 inputs, and of 48 where there are 96
    scales = 2 * (4 * 64 + 2 * 96 + 64) if qtype == "int8" else 2 * (4 * 64 + 2 * 96 + 2 * 64)
    assert report.after == weights * bits // 8 + 4 * scales
    codes = [v for _, v in nnx.to_flat_state(nnx.state(model)) if jnp.issubdtype(v[...].dtype, jnp.integer)]
    assert sum(v[...].size for v in codes) == weights


def test_training_moves_adapters_alone_and_merge_gives_what_was_trained(caplog):
    model = decoder()
    mj.quantize(model, "nf4")
    mj.adapt(model, mj.MELoRAConfig(n=4, r=1, targets=["q_proj", "up_proj"]), rngs=nnx.Rngs(1))
    ids = jnp.arange(16).reshape(2, 8)
    tx = mj.make_optimizer(model, 1e-1)
    step = mj.make_train_step(model, tx, lambda model, ids: (model(ids) ** 2).mean())
    state, frozen = mj.train_state(model, tx)
    before = jax.tree.map(np.asarray, frozen)
    losses = []
    for _ in range(4):
        state, metrics = step(state, frozen, ids, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.trainable))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, frozen)))
    nnx.update(model, state.trainable)
    with caplog.at_level(logging.INFO, "melora_jax"):
        plain = mj.merge(model)
    assert "14 kernels in nf4 become float32; their quantisation error" in caplog.text
    assert not [node for _, node in nnx.iter_graph(plain) if isinstance(node, QuantizedLinear | mj.FrozenParam)]
    np.testing.assert_allclose(plain(ids), model(ids), rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(
        mj.unwrap(model).model.layers[0].mlp.gate_proj.kernel, plain.model.layers[0].mlp.gate_proj.kernel[...]
    )


def test_a_merged_model_is_saved_and_loaded(tmp_path):
    model = decoder("bfloat16")
    mj.quantize(model, "int8")
    mj.adapt(model, mj.MELoRAConfig(n=2, targets=["v_proj"]), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"save mj\.merge"):
        mj.save_pretrained(model, tmp_path / "m")
    merged = mj.merge(model)
    mj.save_pretrained(merged, tmp_path / "m")
    loaded = mj.from_pretrained(tmp_path / "m", task="causal-lm", dtype="bfloat16")
    ids = jnp.arange(6).reshape(1, 6)
    np.testing.assert_array_equal(loaded(ids), merged(ids))


def test_what_cannot_be_done_is_said(monkeypatch):
    model = decoder()
    with pytest.raises(ValueError, match="qtype 'int3' is unknown; choose int8 or nf4"):
        mj.quantize(model, "int3")
    with pytest.raises(ValueError, match=r"no plain nnx\.Linear in numbered layers"):
        mj.quantize(nnx.Sequential(), "int8")
    mj.quantize(model, "int8")
    with pytest.raises(ValueError, match=r"no plain nnx\.Linear in numbered layers"):
        mj.quantize(model, "int8")
    with pytest.raises(ValueError, match=r"would train model/layers/1/mlp/\w+, which is quantised to int8"):
        mj.adapt(model, mj.MELoRAConfig(n=2, targets=["q_proj"], modules_to_save=["layers/1/mlp"]), rngs=nnx.Rngs(1))
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"melora_jax\[quant\]"):
        mj.quantize(decoder(), "nf4")


@pytest.mark.slow
def test_a_run_on_a_quantised_base(tmp_path, capsys):
    place = make_material(tmp_path)
    path = recipe(place, model={"quantize": "nf4"}, data={"buckets": [24]}, train={"max_steps": 4, "eval_every": 2})
    assert main(["run", str(path)]) == 0
    assert "6 kernels quantised to nf4, from 0.0 MB to 0.0 MB" in capsys.readouterr().out
    first, *_, last = [event["loss"] for event in read_metrics(place / "run") if event["kind"] == "train"]
    assert np.isfinite(first)
    assert last != first
