"""Encoders against torch transformers; padding, dropout, dtypes and refused inputs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import melora_jax as mj
from melora_jax.models import model_from_config
from melora_jax.models.activations import ACTIVATIONS
from melora_jax.models.hub.names import torch_name
from melora_jax.nn.attention import attention, padding_bias
from melora_jax.nn.tree import variables_of
from tests.support.models_fixtures import CONFIGS, FAMILIES, batch, random_model, torch_model, torch_output

apply = nnx.jit(lambda model, *inputs: model(*inputs))


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("task", "labels"), [("sequence-classification", 5), ("regression", 1), ("encoder", None)])
def test_outputs_equal_those_of_transformers(tmp_path, family, task, labels):
    reference = torch_model(family, task, labels or 2)
    reference.save_pretrained(tmp_path)
    model = mj.from_pretrained(tmp_path, task=task)
    inputs = batch(family)
    expected = torch_output(reference, inputs)
    found = np.asarray(model(*inputs.values()))
    assert found.shape == ((3, labels) if labels else (3, 11, 21))
    valid = inputs["attention_mask"] == 1 if task == "encoder" else slice(None)
    np.testing.assert_allclose(found[valid], expected[valid], rtol=0, atol=5e-6)
    assert np.ptp(expected, axis=0).mean() > 0.1


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_without_mask_and_types_as_in_transformers(tmp_path, family):
    reference = torch_model(family, "sequence-classification")
    reference.save_pretrained(tmp_path)
    ids = {"input_ids": batch(family)["input_ids"]}
    found = mj.from_pretrained(tmp_path)(*ids.values())
    np.testing.assert_allclose(found, torch_output(reference, ids), rtol=0, atol=5e-6)


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["sequence-classification", "encoder"])
def test_variables_have_the_names_and_shapes_of_transformers(family, task):
    expected = {name: tuple(tensor.shape) for name, tensor in torch_model(family, task).state_dict().items()}
    paths = variables_of(random_model(family, task=task))
    found = {torch_name(path): v.shape[::-1] if path.endswith("kernel") else v.shape for path, v in paths.items()}
    assert found == expected


@pytest.mark.parity
def test_minilm_equals_transformers(minilm_folder):
    import transformers

    inputs = {
        "input_ids": np.random.default_rng(0).integers(1000, 30000, (5, 37)),
        "attention_mask": (np.arange(37)[None] < np.array([[37], [31], [23], [11], [2]])).astype(np.int64),
    }
    reference = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    found = np.asarray(apply(mj.from_pretrained(minilm_folder, task="encoder"), *inputs.values()))
    difference = np.abs(found - torch_output(reference, inputs))[inputs["attention_mask"] == 1]
    assert difference.max() < 2e-5


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_equal_those_of_transformers(name):
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-9, 9, 997, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), ACT2FN[name](torch.from_numpy(x)), rtol=0, atol=2e-6)


def test_attention_equals_numpy():
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((2, t, 3, 7)) for t in (5, 11, 11))
    bias = np.where(rng.random((2, 1, 1, 11)) < 0.4, -1e30, 0.0)
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(7) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), v)
    found = attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, bias)), 0.0, "self")
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_changes_nothing(family):
    inputs = batch(family)
    inputs["attention_mask"][0, 6:] = 0
    inputs["input_ids"][0, 6:] = CONFIGS[family]["pad_token_id"]
    short = {name: value[:, :7] for name, value in inputs.items()}
    model = random_model(family, num_labels=5)
    np.testing.assert_allclose(model(*inputs.values()), model(*short.values()), rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_padding_alone_gives_finite_values(family):
    ids = np.full((2, 7), CONFIGS[family]["pad_token_id"])
    assert np.isfinite(random_model(family)(ids, np.zeros((2, 7)))).all()


def test_a_row_of_padding_alone_gives_finite_gradients():
    x = jnp.linspace(-1, 1, 2 * 5 * 3 * 7).reshape(2, 5, 3, 7)
    bias = padding_bias(jnp.zeros((2, 5)))
    gradient = jax.jit(jax.grad(lambda x: attention(x, x, x, bias, 0.0, "self").sum()))(x)
    assert np.isfinite(gradient).all()


def test_bfloat16_computes_in_bfloat16():
    inputs = batch("bert")
    exact = np.asarray(random_model("bert", num_labels=5)(*inputs.values()))
    found = apply(random_model("bert", num_labels=5, dtype="bfloat16"), *inputs.values())
    assert found.dtype == jnp.bfloat16
    # 8 bits of mantissa through two layers
    assert np.abs(np.asarray(found, np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_bfloat16_takes_the_softmax_in_float32():
    # scores 256 and 257, which bfloat16 cannot tell apart
    query = jnp.array([32, 1, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    key = jnp.array([[16, 0, 0, 0], [16, 2, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    value = jnp.eye(2, 4, dtype=jnp.bfloat16).reshape(1, 2, 1, 4)
    found = attention(query, key, value, None, 0.0, "self").astype(jnp.float32).reshape(4)
    # rounded twice, before and after the product with value, by up to 2^-8 each
    np.testing.assert_allclose(found, [1 / (1 + np.e), np.e / (1 + np.e), 0, 0], rtol=2**-7)


def test_bfloat16_takes_the_statistics_of_norms_in_float32():
    norm = random_model("bert", dtype="bfloat16").bert.embeddings.LayerNorm
    x = np.array([256.0] * 20 + [258.0])
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * np.asarray(norm.scale.get_value(), np.float64)
    found = norm(jnp.asarray(x, jnp.bfloat16)) - norm.bias.get_value()
    # the bias is added and taken off in bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_sites_and_rates_are_those_of_hugging_face(monkeypatch, family):
    sites = []
    encoders = "melora_jax.models.encoders"
    for module in (f"{encoders}.bert", f"{encoders}.distilbert", f"{encoders}.heads", "melora_jax.nn.attention"):
        monkeypatch.setattr(f"{module}.dropout", lambda x, rate, path: sites.append((path, rate)) or x)
    random_model(family, num_labels=5)(*batch(family).values())
    if family == "distilbert":
        inner = [("attention", 0.13), ("ffn", 0.11)]
        expected = [("embeddings", 0.11), *((f"transformer/layer/{i}/{n}", r) for i in (0, 1) for n, r in inner)]
        head = [("classifier", 0.23)]
    else:
        inner = [("attention/self", 0.13), ("attention/output", 0.11), ("output", 0.11)]
        expected = [("embeddings", 0.11), *((f"encoder/layer/{i}/{n}", r) for i in (0, 1) for n, r in inner)]
        head = [("classifier", 0.19)] if family == "bert" else [("classifier", 0.11)] * 2
    prefix = {"xlm-roberta": "roberta"}.get(family, family)
    assert sites == [(f"{prefix}/{path}", rate) for path, rate in expected] + head


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["sequence-classification", "encoder"])
def test_dropout_follows_the_key(family, task):
    model = random_model(family, task=task)
    inputs = batch(family).values()
    first, again, other = (model(*inputs, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    evaluation = model(*inputs)
    assert (first != evaluation).any()
    assert (evaluation == model(*inputs)).all()
    with mj.dropout_key(jax.random.key(1)):
        assert (model(*inputs) == first).all()


@pytest.mark.slow
@given(rate=st.integers(3, 61).map(lambda sixtyfourths: sixtyfourths / 64))
def test_attention_dropout_drops_its_fraction_and_keeps_the_mean(rate):
    t = 23
    equal = jnp.zeros((7, t, 3, t))
    values = jnp.broadcast_to(jnp.eye(t)[None, :, None], (7, t, 3, t))
    with mj.dropout_key(jax.random.key(0)):
        weights = np.asarray(attention(equal, equal, values, None, rate, "self"))
    deviation = np.sqrt(rate * (1 - rate) / weights.size)
    assert abs((weights == 0).mean() - rate) < 5 * deviation
    np.testing.assert_allclose(weights[weights != 0], 1 / t / (1 - rate), rtol=1e-5)


def test_layers_are_equal_modules_so_that_they_can_be_stacked():
    layers = random_model("roberta").roberta.encoder.layer
    assert nnx.graphdef(layers[0]) == nnx.graphdef(layers[1])


def test_random_models_follow_the_initializer_range():
    config = CONFIGS["bert"] | {"initializer_range": 0.5, "vocab_size": 1009}
    values = {path: np.asarray(v.get_value()) for path, v in variables_of(model_from_config(config)).items()}
    assert abs(values["bert/embeddings/word_embeddings/embedding"].std() - 0.5) < 0.02
    assert abs(values["bert/encoder/layer/0/intermediate/dense/kernel"].std() - 0.5) < 0.1
    assert not values["classifier/bias"].any()
    assert (values["bert/embeddings/LayerNorm/scale"] == 1).all()


BAD_INPUTS = {
    "input_ids hold 18 tokens a row, bert/embeddings/position_embeddings has positions for 1 to 17": {
        "input_ids": np.ones((2, 18), int)
    },
    "input_ids hold 0 tokens": {"input_ids": np.ones((2, 0), int)},
    "input_ids range from 1 to 101, vocab_size is 101; use the tokenizer": {"input_ids": np.array([[1, 101]])},
    "input_ids range from -1 to 1": {"input_ids": np.array([[1, -1]])},
    "input_ids are float32": {"input_ids": np.ones((2, 3), np.float32)},
    "input_ids are int32[3]; give whole numbers of shape [batch, tokens]": {"input_ids": np.ones(3, np.int32)},
    "attention_mask have shape [2, 4], input_ids [2, 3]": {"attention_mask": np.ones((2, 4))},
    "token_type_ids have shape [1, 3]": {"token_type_ids": np.ones((1, 3), int)},
    "token_type_ids range from 5 to 5, type_vocab_size is 5; leave": {"token_type_ids": np.full((2, 3), 5)},
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs_are_refused(message):
    model = random_model("bert")
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**({"input_ids": np.ones((2, 3), int)} | BAD_INPUTS[message]))


def test_a_long_sequence_is_refused_while_tracing():
    # RoBERTa counts positions from pad_token_id + 1 = 2, which leaves 15 of 17
    model = random_model("roberta")
    assert model.max_length == 15
    assert jax.eval_shape(model, jnp.full((1, 15), 9)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"hold 16 tokens a row.* for 1 to 15; truncate in the tokenizer"):
        jax.eval_shape(model, jnp.full((1, 16), 9))


def test_distilbert_refuses_token_types():
    with pytest.raises(ValueError, match="DistilBERT has no token types"):
        random_model("distilbert")(np.ones((2, 3), int), None, np.zeros((2, 3), int))


BAD_CONFIGS = {
    "model_type 'gpt2' in config.json is not supported; choose a checkpoint of bert, roberta, xlm-roberta, distil": {
        "model_type": "gpt2"
    },
    "position_embedding_type='relative_key' in config.json is not supported, only 'absolute'": {
        "position_embedding_type": "relative_key"
    },
    "is_decoder=True in config.json": {"is_decoder": True},
    "add_cross_attention=True in config.json": {"add_cross_attention": True},
    "pruned_heads={'0': [1]} in config.json": {"pruned_heads": {"0": [1]}},
    "quantization_config={'bits': 4} in config.json": {"quantization_config": {"bits": 4}},
    "hidden_act='snake' in config.json is not supported; choose from gelu": {"hidden_act": "snake"},
    "config.json lacks hidden_size": {"hidden_size": None},
    "num_hidden_layers='2' in config.json must be a whole number": {"num_hidden_layers": "2"},
    "hidden_dropout_prob=1.5 in config.json must be a probability": {"hidden_dropout_prob": 1.5},
    "layer_norm_eps=0 in config.json must be a positive number": {"layer_norm_eps": 0},
    "num_attention_heads=4 does not divide hidden_size=21 in config.json": {"num_attention_heads": 4},
    "pad_token_id=None in config.json; positions are counted from it": {"model_type": "roberta", "pad_token_id": None},
    "num_labels='3' in config.json must be": {"num_labels": "3"},
    "id2label in config.json has keys ['0', '2']; number the labels from 0": {"id2label": {"0": "a", "2": "b"}},
    "num_labels=3, its id2label names 2": {"num_labels": 3, "id2label": {"0": "a", "1": "b"}},
    "id2label in config.json must map": {"id2label": ["a", "b"]},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_unsupported_or_impossible_configurations_are_refused_by_name(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_from_config(CONFIGS["bert"] | BAD_CONFIGS[message])


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("dtype 'float16' is not supported; choose from float32, bfloat16", {"dtype": "float16"}),
        ("task 'ner' is unknown; choose from sequence-classification, regression, encoder", {"task": "ner"}),
        ("regression has one output, not num_labels=3", {"task": "regression", "num_labels": 3}),
        ("an encoder has no labels", {"task": "encoder", "num_labels": 3}),
        ("num_labels=0 must be at least 1", {"num_labels": 0}),
        ("num_labels=3 but 2 label_names", {"num_labels": 3, "label_names": ["a", "b"]}),
        ("label_names ['a', 'a'] must be distinct", {"label_names": ["a", "a"]}),
    ],
)
def test_impossible_arguments_are_refused(message, arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_from_config(CONFIGS["bert"], **arguments)


def test_the_configuration_describes_the_model():
    model = random_model("bert", label_names=["no", "yes", "maybe"], dtype="bfloat16")
    assert (model.num_labels, model.task, model.dtype) == (3, "sequence-classification", "bfloat16")
    assert model.config["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert model.config["label2id"] == {"no": 0, "yes": 1, "maybe": 2}
    assert model.config["architectures"] == ["BertForSequenceClassification"]
    assert model.config["dtype"] == "bfloat16"
    assert random_model("bert", task="regression").config["problem_type"] == "regression"
    model.config["id2label"]["0"] = "changed"
    assert model.config["id2label"]["0"] == "no"
