"""GGUF files as checkpoints: the tensors, configuration and logits of the Hugging Face checkpoint they stand for."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

import melora_jax as mj
from melora_jax.models.decoders.config import decoder_config
from melora_jax.models.gguf.tensors import GGUFTensors
from melora_jax.nn.tree import variables_of
from tests.models.gguf.gguf_fixtures import CASES, fields_of, gguf_writer, llama3_factors, write_fields, write_gguf
from tests.support.decoder_fixtures import CONFIGS, SIZES, apply, random_decoder, token_ids, torch_decoder, torch_run
from tests.support.models_fixtures import tensors_of

PACKINGS = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
SMALL = CONFIGS["llama"] | {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "intermediate_size": 96}


def case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A configuration, and random tensors; norms in steps of 1/64, so that nothing is lost by adding 1."""
    source, changes = CASES[name]
    tensors = tensors_of(random_decoder(source, changes))
    coarse = {
        key: np.round(value * 64) / 64 if key.endswith("norm.weight") else value for key, value in tensors.items()
    }
    return CONFIGS[source] | changes, coarse


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_sizes_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    config, tensors = case(name)
    file = GGUFTensors(write_gguf(tmp_path / "model.gguf", config, tensors))
    assert file.keys() == sorted(tensors)
    for key, expected in tensors.items():
        assert file.shape(key) == expected.shape
        assert file.dtype(key) == np.float32
        np.testing.assert_array_equal(file.read(key), expected)
    found, expected = (decoder_config(values | {"initializer_range": 0.02}) for values in (file.config, config))
    assert found == expected
    assert json.loads(json.dumps(file.config)) == file.config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "gemma2", "gemma3"])
def test_a_model_computes_what_its_checkpoint_does(name: str, tmp_path: Path) -> None:
    source, changes = CASES[name]
    model = random_decoder(source, changes)
    write_gguf(tmp_path / "model.gguf", CONFIGS[source] | changes, tensors_of(model))
    loaded = mj.from_pretrained(tmp_path / "model.gguf", task="causal-lm")
    ids = token_ids()
    np.testing.assert_allclose(apply(loaded, ids), apply(model, ids), atol=2e-6)
    assert loaded.load_report.files == ("model.gguf",)
    assert loaded.folder == str(tmp_path / "model.gguf")


def test_the_body_alone_and_bfloat16(tmp_path: Path) -> None:
    config, tensors = case("llama")
    write_gguf(tmp_path / "model.gguf", config, tensors)
    body = mj.from_pretrained(tmp_path / "model.gguf", task="encoder", dtype="bfloat16")
    assert {value.dtype for value in variables_of(body).values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        variables_of(body)["layers/1/self_attn/q_proj/kernel"].get_value(),
        jnp.asarray(tensors["model.layers.1.self_attn.q_proj.weight"].T, jnp.bfloat16),
    )


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama3", "mistral", "yarn", "gemma2", "gemma3"])
def test_transformers_computes_the_same_from_what_is_saved(name: str, tmp_path: Path) -> None:
    config, tensors = case(name)
    model = mj.from_pretrained(write_gguf(tmp_path / "model.gguf", config, tensors), task="causal-lm")
    model.folder = ""  # these files have no tokenizer
    mj.save_pretrained(model, tmp_path / "saved")
    theirs, info = torch_decoder(tmp_path / "saved")
    assert not any(info.values())
    ids = token_ids()
    np.testing.assert_allclose(apply(model, ids), torch_run(theirs, ids), atol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_tensors_are_what_the_gguf_package_makes_of_them(packing: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[packing]
    changes = {key: SMALL[key] for key in ("hidden_size", "head_dim", "num_attention_heads", "intermediate_size")}
    tensors = tensors_of(random_decoder("llama", changes))
    file = GGUFTensors(write_gguf(tmp_path / "model.gguf", SMALL, tensors, kind))
    for key, array in tensors.items():
        expected = gguf.dequantize(gguf.quantize(array, kind), kind) if array.ndim == 2 else array
        np.testing.assert_array_equal(file.read(key), expected)


# factor, head_dim and theta of Llama 3.1 8B, 3.2 1B and 3.3 70B
@pytest.mark.parametrize(("factor", "size"), [(8.0, 128), (32.0, 64)])
def test_llama3_is_known_by_its_factors(factor: float, size: int, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = CONFIGS["llama"] | {"head_dim": size, "rope_theta": 5e5, "rope_scaling": scaling}
    factors = llama3_factors(config)
    write = {"llama.attention.key_length": size, "llama.attention.value_length": size, "llama.rope.freq_base": 5e5}
    for scale, expected in ((1.0, scaling), (0.0, None)):
        with gguf_writer(tmp_path / "model.gguf", "llama") as writer:
            for key, value in fields_of(write).items():
                (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
            writer.add_tensor("token_embd.weight", np.ones((11, 12), np.float32))
            writer.add_tensor("rope_freqs.weight", 1.0 + np.float32(scale) * (factors - 1.0))
        file = GGUFTensors(tmp_path / "model.gguf")
        assert file.config["rope_scaling"] == expected


def test_tokens_that_end_a_text_or_a_turn(tmp_path: Path) -> None:
    tokens = {"tokenizer.ggml.tokens": ["a", "<|im_end|>", "b"], "tokenizer.ggml.eos_token_id": 2}

    def ids(changes: dict[str, Any]) -> Any:
        file = GGUFTensors(write_fields(tmp_path / "model.gguf", tokens | changes))
        return file.config["eos_token_id"]

    assert ids({}) == 2
    assert ids({"tokenizer.ggml.eot_token_id": 0}) == [2, 0]
    assert ids({"tokenizer.ggml.eot_token_id": 2}) == 2
    assert ids({"tokenizer.chat_template": "{{ x }}"}) == [2, 1]
    assert ids({"tokenizer.ggml.eos_token_id": None}) is None


@pytest.mark.parametrize(
    ("layers", "heads", "expected"), [(46, 3, 4), (62, 3, 4), (26, 3, 20)], ids=["gemma2-27b", "gemma3-27b", "others"]
)
def test_gemma_of_27_billion_scales_by_another_size(layers: int, heads: int, expected: int, tmp_path: Path) -> None:
    architecture = "gemma3" if layers == 62 else "gemma2"
    fields = fields_of({"llama.block_count": layers, "llama.attention.head_count": heads})
    fields |= {"llama.attention.key_length": 20, "llama.attention.value_length": 20}
    fields["llama.attention.sliding_window"] = 5
    renamed = {key.replace("llama.", f"{architecture}."): value for key, value in fields.items()}
    removed = dict.fromkeys(fields_of({}))
    norms = {f"blk__{layer}__attn_norm__weight": (12,) for layer in range(layers)}
    file = GGUFTensors(write_fields(tmp_path / "model.gguf", removed | renamed, architecture, **norms))
    assert file.config["query_pre_attn_scalar"] == expected


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({"llama.expert_count": 8}, {}, "'llama.expert_count' in .*, of value 8, is not supported"),
        ({"llama.logit_scale": 2.0}, {}, "'llama.logit_scale' in .*, of value 2.0, is not supported"),
        ({"llama.two\nlines": "x" * 999}, {}, r"'llama.two\\nlines' in .*, of value 'x{98}, is not supported"),
        ({"llama.attention.head_count": [3, 3]}, {}, "llama.attention.head_count in .* differs from layer to layer"),
        ({"llama.block_count": "1"}, {}, "block_count='1' in .* must be a number"),
        ({"llama.block_count": None}, {}, "lacks block_count"),
        ({"llama.block_count": 2**32 - 1}, {}, "has 4294967295 layers in 1 tensors"),
        ({"tokenizer.ggml.tokens": 7}, {}, "tokenizer.ggml.tokens in .* is not a list"),
        ({"llama.attention.value_length": 5}, {}, "attention.value_length=5 in .* is not the size of its heads, 4"),
        ({"llama.rope.dimension_count": 2}, {}, "rope.dimension_count=2 in .* is not the size of its heads, 4"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type='longrope' in .* is not supported"),
        ({"llama.rope.scaling.type": "linear"}, {}, "lacks rope.scaling.factor"),
        ({"llama.vocab_size": 12}, {}, "token_embd.weight in .* has 11 rows for 0 tokens and a vocab_size of 12"),
        ({"tokenizer.ggml.tokens": ["t"] * 12}, {}, "has 11 rows for 12 tokens"),
        ({"tokenizer.ggml.bos_token_id": 11}, {}, "tokenizer.ggml.bos_token_id=11 in .* is not a token"),
        ({"split.count": 3}, {}, "is one of the 3 parts of a split GGUF file"),
        ({}, {"token_embd__weight": ()}, "lacks the tensor token_embd.weight"),
        ({}, {"blk.0.ffn_gate_exps__weight": (2, 7, 12)}, "'blk.0.ffn_gate_exps.weight' in .* has no place in a llama"),
        ({}, {"rope_factors_long__weight": (2,)}, "'rope_factors_long.weight' in .* has no place in a llama"),
        ({}, {"rope_freqs__weight": (3,)}, "rope_freqs.weight in .* are not the factors of Llama 3.1"),
        ({"llama.rope.scaling.type": "yarn"}, {"rope_freqs__weight": (2,)}, "contradicts the RoPE that the file names"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, Any], shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    write_fields(tmp_path / "model.gguf", changes, **shapes)
    with pytest.raises(ValueError, match=message) as caught:
        mj.from_pretrained(tmp_path / "model.gguf", task="causal-lm")
    assert "\n" not in str(caught.value)


def test_other_factors_than_llama3s_are_refused(tmp_path: Path) -> None:
    write_fields(tmp_path / "model.gguf", {}, rope_freqs__weight=(2,))
    content = (tmp_path / "model.gguf").read_bytes()
    assert content.endswith(struct.pack("<2f", 1.0, 1.0) + bytes(24))
    (tmp_path / "model.gguf").write_bytes(content[:-32] + struct.pack("<2f", 3.0, 2.0) + bytes(24))
    with pytest.raises(ValueError, match="are not the factors of Llama"):
        mj.from_pretrained(tmp_path / "model.gguf", task="causal-lm")


@pytest.mark.parametrize("architecture", ["phi3", "mamba"])
def test_other_architectures_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    write_fields(tmp_path / "model.gguf", {}, architecture)
    with pytest.raises(ValueError, match=f"general.architecture='{architecture}' .* choose a model of llama, qwen2"):
        mj.from_pretrained(tmp_path / "model.gguf", task="causal-lm")


def test_tensors_of_other_sizes_are_refused_before_any_is_read(tmp_path: Path) -> None:
    config, tensors = case("llama")
    write_gguf(tmp_path / "model.gguf", config | {"hidden_size": 44}, tensors)
    with pytest.raises(ValueError, match=r"model.gguf has shape \[101, 42\], .* asks for \[101, 44\]"):
        mj.from_pretrained(tmp_path / "model.gguf", task="causal-lm")


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    write_fields(tmp_path / "model.gguf", {})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    with pytest.raises(FileNotFoundError, match=r"holds no safetensors, but model.gguf; give the path of that file"):
        mj.from_pretrained(tmp_path, task="causal-lm")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        mj.from_pretrained("absent.gguf", task="causal-lm")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fields(tmp_path / "model.gguf", {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'melora_jax\[gguf\]'"):
        GGUFTensors(tmp_path / "model.gguf")
