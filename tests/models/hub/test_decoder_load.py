"""Decoder checkpoints, read and written; transformers is the oracle where it is installed."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest

import melora_jax as mj
from melora_jax.models import model_from_config
from melora_jax.models.decoders.config import decoder_config
from tests.support.decoder_fixtures import (
    CONFIGS,
    NAMES,
    apply,
    checkpoint,
    padded,
    random_decoder,
    torch_decoder,
    torch_run,
)
from tests.support.models_fixtures import tensors_of, write_checkpoint

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def same(found, expected) -> bool:
    """Whether two models have the same variables, bit for bit."""
    a, b = tensors_of(found), tensors_of(expected)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and (a[name] == b[name]).all() for name in a)


# what loads


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path, name):
    for task, dtype in (("causal-lm", "float32"), ("encoder", "bfloat16")):
        model = random_decoder(name, task=task, dtype=dtype)
        mj.save_pretrained(model, tmp_path / task)
        loaded = mj.from_pretrained(tmp_path / task, task=task, dtype=dtype)
        assert same(loaded, model)
        assert loaded.config == model.config
        assert loaded.load_report.initialised == loaded.load_report.ignored == ()
        assert (loaded.task, loaded.num_labels) == (task, None)
        assert loaded.max_length == CONFIGS[name]["max_position_embeddings"]


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_configurations_of_transformers_4_and_5_give_the_same_model(tmp_path, name):
    reference, _ = torch_decoder(checkpoint(tmp_path / "4", name))
    reference.save_pretrained(tmp_path / "5")
    style_4, style_5 = (json.loads((tmp_path / style / "config.json").read_text()) for style in "45")
    assert "rope_parameters" in style_5
    assert "rope_parameters" not in style_4
    assert not {"rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype"} & set(style_5)
    assert decoder_config(style_5) == decoder_config(style_4)
    first, second = (mj.from_pretrained(tmp_path / style, task="causal-lm") for style in "45")
    assert same(first, second)
    assert first.config["torch_dtype"] == second.config["dtype"] == "float32"


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "smollm2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_transformers_loads_what_was_saved(tmp_path, name):
    model = random_decoder(name)
    mj.save_pretrained(model, tmp_path / "saved")
    reference, info = torch_decoder(tmp_path / "saved")
    assert not any(info.values()), info
    assert type(reference).__name__ == model.config["architectures"][0]
    ids, mask, positions = padded()
    found = np.asarray(apply(model, ids, mask))[mask == 1]
    np.testing.assert_allclose(found, torch_run(reference, ids, mask, positions)[mask == 1], rtol=0, atol=1e-5)
    tied = name not in ("llama", "mistral")
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == tied
    assert (HEAD in tensors_of(model)) == (not tied)


@pytest.mark.parity
def test_a_sharded_checkpoint_of_transformers(tmp_path):
    reference, _ = torch_decoder(checkpoint(tmp_path / "whole", "llama"))
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    sharded = mj.from_pretrained(tmp_path / "sharded", task="causal-lm")
    assert len(sharded.load_report.files) > 2
    assert same(sharded, mj.from_pretrained(tmp_path / "whole", task="causal-lm"))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_dtypes_are_converted(tmp_path, stored, dtype):
    tensors = {name: tensor.astype(stored) for name, tensor in tensors_of(random_decoder("gemma2")).items()}
    loaded = tensors_of(
        mj.from_pretrained(write_checkpoint(tmp_path, CONFIGS["gemma2"], tensors), task="causal-lm", dtype=dtype)
    )
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor.astype(np.dtype(dtype)), strict=True)


def test_a_body_fills_a_tied_language_model_and_back(tmp_path):
    body, whole = (random_decoder("qwen3", task=task) for task in ("encoder", "causal-lm"))
    assert {f"model.{name}" for name in tensors_of(body)} == set(tensors_of(whole))
    mj.save_pretrained(body, tmp_path / "body")
    assert mj.from_pretrained(tmp_path / "body", task="causal-lm").load_report.initialised == ()
    mj.save_pretrained(random_decoder("llama"), tmp_path / "whole")
    loaded = mj.from_pretrained(tmp_path / "whole", task="encoder")
    assert loaded.load_report.ignored == ((HEAD, "head of another task"),)
    assert loaded.config["architectures"] == ["LlamaModel"]


def test_buffers_and_the_copy_of_a_tied_head_are_left_out(tmp_path):
    tensors = tensors_of(random_decoder("smollm2"))
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32) for layer in range(2)}
    folder = write_checkpoint(tmp_path, CONFIGS["smollm2"], tensors | buffers | {HEAD: tensors[EMBEDDING]})
    loaded = mj.from_pretrained(folder, task="causal-lm")
    assert same(loaded, random_decoder("smollm2"))
    assert dict(loaded.load_report.ignored) == {HEAD: "tied to the embedding"} | dict.fromkeys(
        buffers, "buffer, computed on the fly"
    )


def test_the_remat_option_reaches_the_model(tmp_path):
    folder = checkpoint(tmp_path, "llama")
    assert mj.from_pretrained(folder, task="causal-lm", remat="dots").model.remat == "dots"
    with pytest.raises(ValueError, match="remat 'some' is unknown; choose from none, dots, full"):
        mj.from_pretrained(folder, task="causal-lm", remat="some")
    with pytest.raises(ValueError, match="remat 'full' is not offered for bert, only for decoders"):
        model_from_config({"model_type": "bert"}, remat="full")


# what does not load


QUERY = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    f"lacks {QUERY}; check model_type": ("llama", {QUERY: None}),
    r"lacks model.layers.0.self_attn.q_norm.weight; check": ("qwen3", {"model.layers.0.self_attn.q_norm.weight": None}),
    rf"lacks {HEAD}; if its embedding is its head too, set tie_word_embeddings to true in its": (
        "llama",
        {HEAD: None},
    ),
    r"holds model.layers.1.self_attn.q_proj.bias \(in model.safetensors\), for which the llama of its config": (
        "llama",
        {"model.layers.1.self_attn.q_proj.bias": np.ones(60, np.float32)},
    ),
    rf"{QUERY} in .*model.safetensors has shape \[60, 41\], config.json asks for \[60, 42\]; correct the sizes": (
        "llama",
        {QUERY: np.ones((60, 41), np.float32)},
    ),
    rf"{EMBEDDING} in .* has shape \[103, 42\], config.json asks for \[101, 42\]; its vocabulary is not that of": (
        "smollm2",
        {EMBEDDING: np.ones((103, 42), np.float32)},
    ),
    rf"{HEAD} in .* differs from {EMBEDDING}, but config.json ties the two; set tie_word_embeddings to false": (
        "smollm2",
        {HEAD: np.ones((101, 42), np.float32)},
    ),
    rf"{QUERY} in .* is int8; quantised checkpoints are not supported": ("llama", {QUERY: np.ones((60, 42), np.int8)}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path, message):
    name, changes = BROKEN[message]
    tensors = tensors_of(random_decoder(name)) | changes
    write_checkpoint(tmp_path, CONFIGS[name], {key: tensor for key, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ValueError, match=message) as error:
        mj.from_pretrained(tmp_path, task="causal-lm")
    assert "\n" not in str(error.value)


BAD_CONFIGS = {
    "model_type 'gpt2' in config.json is not supported; choose a checkpoint of bert, roberta, xlm-roberta, distilbert,"
    " llama, mistral, qwen2, qwen3, gemma2, gemma3_text": ("llama", {"model_type": "gpt2"}),
    "model_type 'gemma3' in config.json is the model of images and text, which is not supported; choose a checkpoint of"
    " text alone, gemma3_text": ("gemma3_text", {"model_type": "gemma3"}),
    "quantization_config={'bits': 4} in config.json is not supported": ("llama", {"quantization_config": {"bits": 4}}),
    "use_bidirectional_attention=True in config.json": ("gemma3_text", {"use_bidirectional_attention": True}),
    "rope_interleaved=True in config.json": ("smollm2", {"rope_interleaved": True}),
    "hidden_act='snake' in config.json is not supported; choose from gelu": ("llama", {"hidden_act": "snake"}),
    "hidden_activation='snake' in config.json": ("gemma2", {"hidden_activation": "snake"}),
    "config.json lacks hidden_size": ("llama", {"hidden_size": None}),
    "config.json lacks max_position_embeddings": ("llama", {"max_position_embeddings": None}),
    "num_hidden_layers='2' in config.json must be a number": ("llama", {"num_hidden_layers": "2"}),
    "num_hidden_layers=1.5 in config.json must be a whole number": ("llama", {"num_hidden_layers": 1.5}),
    "attention_bias=1 in config.json must be true or false": ("llama", {"attention_bias": 1}),
    "attention_dropout=1.0 in config.json must be a probability": ("llama", {"attention_dropout": 1.0}),
    "rms_norm_eps=0 in config.json must be a positive number": ("llama", {"rms_norm_eps": 0}),
    "num_attention_heads=5 does not divide hidden_size=42": ("llama", {"num_attention_heads": 5, "head_dim": None}),
    "num_key_value_heads=4 does not divide num_attention_heads=6": ("llama", {"num_key_value_heads": 4}),
    "head_dim=7 in config.json is odd": ("llama", {"head_dim": 7}),
    "RoPE of type 'longrope' in config.json is not supported": ("llama", {"rope_scaling": {"type": "longrope"}}),
    "rope_parameters={'full_attention': {}} in config.json must be one flat object for qwen2": (
        "qwen2",
        {"rope_parameters": {"full_attention": {}}},
    ),
    "rope_parameters={'rope_theta': 10000.0} in config.json must be one object for each of full_attention and": (
        "gemma3_text",
        {"rope_parameters": {"rope_theta": 1e4}},
    ),
    "layer_types=['full_attention'] in config.json must name full_attention or sliding_attention for each of the 2": (
        "qwen2",
        {"layer_types": ["full_attention"]},
    ),
    "layer_types in config.json mix full and sliding attention, which mistral does not have": (
        "mistral",
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "layer_types in config.json name sliding_attention, but no sliding_window is in use": (
        "qwen3",
        {"use_sliding_window": False},
    ),
    "sliding_window=0 in config.json must be a whole number of at least 1": ("gemma2", {"sliding_window": 0}),
    "attn_logit_softcapping=50.0 in config.json is not used by gemma3_text": (
        "gemma3_text",
        {"attn_logit_softcapping": 50.0},
    ),
    "final_logit_softcapping=-1 in config.json must be a positive number": ("gemma2", {"final_logit_softcapping": -1}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_unsupported_or_impossible_configurations_are_refused_by_name(message):
    name, changes = BAD_CONFIGS[message]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        model_from_config(CONFIGS[name] | changes, task="causal-lm")
    assert "\n" not in str(error.value)


def test_the_count_of_key_heads_is_not_guessed():
    without = {key: value for key, value in CONFIGS["mistral"].items() if key != "num_key_value_heads"}
    with pytest.raises(ValueError, match=r"config\.json lacks num_key_value_heads"):
        decoder_config(without)
    assert decoder_config(without | {"num_key_value_heads": None}).num_kv_heads == 6


@pytest.mark.parametrize(
    ("message", "config", "arguments"),
    [
        ("regression has one output, not num_labels=3", "gemma2", {"task": "regression", "num_labels": 3}),
        ("a language model has no labels", "llama", {"task": "causal-lm", "num_labels": 3}),
        ("dtype 'float16' is not supported", "llama", {"task": "causal-lm", "dtype": "float16"}),
    ],
)
def test_impossible_arguments_are_refused(message, config, arguments):
    with pytest.raises(ValueError, match=re.escape(message)):
        model_from_config(CONFIGS[config], **arguments)


def test_an_encoder_is_no_language_model():
    with pytest.raises(
        ValueError, match="task 'causal-lm' is not offered for bert; choose from sequence-classification"
    ):
        model_from_config({"model_type": "bert"}, task="causal-lm")
