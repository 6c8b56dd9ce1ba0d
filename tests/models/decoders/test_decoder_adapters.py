"""Adapters in decoders: where they go, merged and exported they give the same logits."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.adapters.params import MELoRAParam
from tests.support.decoder_fixtures import (
    apply,
    checkpoint,
    padded,
    random_decoder,
    token_ids,
    torch_decoder,
    torch_run,
)

pytestmark = pytest.mark.slow


def adapted(model, **changes):
    """The model with adapters whose B is not zero."""
    config = mj.MELoRAConfig(**({"n": 2, "r": 2, "alpha": 3.0, "targets": ["q_proj", "v_proj"]} | changes))
    mj.adapt(model, config, rngs=nnx.Rngs(3))
    factors = nnx.state(model, MELoRAParam)
    drawn = np.random.default_rng(9)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.2 * drawn.standard_normal(leaf.shape).astype("f"), factors))
    return model


@pytest.mark.parametrize(("name", "layers"), [("llama", 7), ("gemma3_text", 7)])
def test_all_linear_is_every_layer_but_the_head(name, layers):
    adaptation = mj.adapt(random_decoder(name), mj.MELoRAConfig(n=2, targets="all-linear"), rngs=nnx.Rngs(0))
    found = {site.path for site in adaptation.sites}
    names = ["self_attn/" + part for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    names += ["mlp/" + part for part in ("gate_proj", "up_proj", "down_proj")]
    assert found == {f"model/layers/{layer}/{part}" for layer in range(2) for part in names}
    assert len(found) == 2 * layers


def test_a_head_that_is_named_is_adapted():
    model = adapted(random_decoder("llama"), targets=["lm_head"], n=1)
    assert [site.path for site in mj.describe(model).sites] == ["lm_head"]
    merged = mj.merge(model)
    np.testing.assert_allclose(apply(model, token_ids()), apply(merged, token_ids()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("mistral", "all-linear"), ("qwen2", ["q_proj", "v_proj"]), ("gemma2", ["embed_tokens", "o_proj"])],
)
def test_adapted_equals_merged(tmp_path, name, targets):
    plain = random_decoder(name)
    model = adapted(random_decoder(name), targets=targets, n=1 if name == "gemma2" else 2)
    ids, mask, _ = padded()
    found = np.asarray(apply(model, ids, mask))
    assert np.abs(found - np.asarray(apply(plain, ids, mask)))[mask == 1].max() > 0.05
    merged = mj.merge(model)
    np.testing.assert_allclose(found[mask == 1], np.asarray(apply(merged, ids, mask))[mask == 1], rtol=0, atol=2e-5)
    mj.save_pretrained(merged, tmp_path / "merged")
    again = mj.from_pretrained(tmp_path / "merged", task="causal-lm")
    np.testing.assert_array_equal(again.hidden(ids, mask), merged.hidden(ids, mask))
    mj.save_adapter(model, tmp_path / "adapter")
    mj.load_adapter(plain, tmp_path / "adapter")
    np.testing.assert_array_equal(apply(plain, ids, mask), found)


def test_the_cache_is_filled_by_adapted_layers():
    model, ids = adapted(random_decoder("qwen3"), targets="all-linear"), token_ids()
    found, _ = nnx.jit(lambda model, cache: model.step(ids[:, :8], cache))(model, model.make_cache(3, 8))
    np.testing.assert_allclose(found, apply(model, ids)[:, :8], rtol=0, atol=1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("smollm2", {"targets": "all-linear", "r": (1, 3)}),
        ("gemma3_text", {"targets": ["q_proj", "k_proj", "down_proj"]}),
        ("llama", {"targets": ["v_proj"], "modules_to_save": ["lm_head"], "alpha": (3.0, 5.0)}),
        ("smollm2", {"targets": ["embed_tokens", "q_proj"], "n": 1}),
        ("smollm2", {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
)
def test_peft_loads_the_export_and_gives_the_same_logits(tmp_path, name, changes):
    import peft

    reference, _ = torch_decoder(checkpoint(tmp_path / "base", name))
    model = adapted(mj.from_pretrained(tmp_path / "base", task="causal-lm"), **changes)
    if "modules_to_save" in changes:
        whole = model.lm_head.kernel if name == "llama" else model.model.embed_tokens.embedding
        whole[...] = whole[...] * 1.5
    mj.export_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    ids, mask, positions = padded()
    before = torch_run(reference, ids, mask, positions)[mask == 1]
    tuned = peft.PeftModel.from_pretrained(reference, tmp_path / "peft").eval()
    assert type(tuned).__name__ == "PeftModelForCausalLM"
    expected = torch_run(tuned, ids, mask, positions)[mask == 1]
    assert np.abs(expected - before).max() > 0.05
    np.testing.assert_allclose(np.asarray(apply(model, ids, mask))[mask == 1], expected, rtol=0, atol=2e-5)
    ours = {f"base_model.model.{site.path.replace('/', '.')}" for site in mj.describe(model).sites}
    theirs = {key.partition(".lora_")[0] for key in tuned.state_dict() if re.search(r"\.lora_(embedding_)?A", key)}
    assert ours == {key for key in theirs if "lm_head" not in key}
