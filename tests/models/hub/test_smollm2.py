"""A real language model: SmolLM2-135M-Instruct gives transformers' logits and knows the capital of France."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from tests.support.decoder_fixtures import apply, torch_decoder, torch_run
from tests.support.models_fixtures import write_checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)


def hugging_face_tensor(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A GGUF tensor under its Hugging Face name, with the rows of each query and key head back in their order."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[
            name
        ], array
    _, layer, part, _ = name.split(".")
    heads = {"attn_q": 9, "attn_k": 3}.get(part)
    if heads:
        array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    return f"model.layers.{layer}.{NAMES[part]}.weight", array


def tokenizer_of(reader: Any) -> Any:
    """The tokenizer in the file; digits are split one by one, which the file only says by the name smollm."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(key: str) -> list:
        return reader.get_field(f"tokenizer.ggml.{key}").contents()

    tokens = field("tokens")
    merges = [tuple(pair.split(" ")) for pair in field("merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, field("token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


@pytest.mark.parity
@pytest.mark.slow
def test_smollm2_equals_transformers_and_answers(tmp_path, smollm2_file):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf to read the weights")
    reader = gguf.GGUFReader(smollm2_file)
    tokenizer = tokenizer_of(reader)
    ids = np.array([tokenizer.encode(QUESTION).ids], np.int32)
    tensors = dict(hugging_face_tensor(t.name, gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors)
    write_checkpoint(tmp_path, CONFIG, {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()})
    del tensors
    reference, info = torch_decoder(tmp_path)
    assert not any(info.values()), info
    model = mj.from_pretrained(tmp_path, task="causal-lm")
    answer = continuation(model, ids, 7)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    whole = np.concatenate([ids, [answer]], axis=1)
    found, expected = np.asarray(apply(model, whole)), torch_run(reference, whole)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert expected[0, ids.shape[1] - 1 : -1].argmax(axis=-1).tolist() == answer


def continuation(model: Any, ids: np.ndarray, count: int) -> list[int]:
    """The likeliest next tokens, one after another."""

    @nnx.jit
    def advance(model, ids, cache):
        logits, cache = model.step(ids, cache)
        return jnp.argmax(logits[:, -1:], axis=-1), cache

    cache, chosen = model.make_cache(1, ids.shape[1] + count), []
    for _ in range(count):
        ids, cache = advance(model, ids, cache)
        chosen.append(int(ids[0, 0]))
    return chosen
