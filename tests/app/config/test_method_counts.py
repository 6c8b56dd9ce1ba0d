"""What each method trains in RoBERTa-base and Llama-2-7B: the paper's counts, from the configurations alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.adapters import Adaptation
from melora_jax.models import abstract_model
from train.config.methods import PRESETS, melora_config
from train.config.schema import AdapterConfig, MethodName

ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
HEAD = 768 * 768 + 768 + 768 * 2 + 2
BIASES = 12 * ((4 + 1 + 2) * 768 + 3072) + 768
ALL = 124_647_170 - HEAD  # transformers' RobertaForSequenceClassification has 124,647,170
R = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both models without values."""
    found = {}
    for values, task in ((ROBERTA, "sequence-classification"), (LLAMA, "causal-lm")):
        folder: Path = tmp_path_factory.mktemp(values["model_type"])
        (folder / "config.json").write_text(json.dumps(values))
        labels = {"num_labels": 2} if values is ROBERTA else {}
        found[values["model_type"]] = abstract_model(folder, task=task, **labels)
    return found


def adapted(model: Any, word: MethodName, **settings: Any) -> Adaptation:
    keys = {"r": R} if PRESETS[word].adapted else {}
    return mj.adapt(nnx.clone(model), melora_config(AdapterConfig(method=word, **keys, **settings)), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("word", PRESETS)
def test_roberta_base(models: dict[str, Any], word: MethodName) -> None:
    adaptation = adapted(models["roberta"], word)
    more = {"dora": 24 * 768, "adalora": 24 * R}.get(word, 0)
    assert adaptation.adapter == (36_864 * R + more if PRESETS[word].adapted else 0)
    assert adaptation.base == {"bitfit": BIASES, "full": ALL}.get(word, 0)
    assert (adaptation.head, adaptation.trainable + adaptation.frozen) == (HEAD, ALL + HEAD + adaptation.adapter)


@pytest.mark.parametrize("word", [word for word, preset in PRESETS.items() if preset.adapted])
def test_llama_2_7b(models: dict[str, Any], word: MethodName) -> None:
    adaptation = adapted(models["llama"], word, targets=("q_proj", "v_proj"), modules_to_save=())
    more = {"dora": 64 * 4096, "adalora": 64 * R}.get(word, 0)
    assert adaptation.trainable == 524_288 * R + more
    assert adaptation.frozen == 6_738_415_616


def test_starts_from_a_kernel_need_no_values_to_be_counted(models: dict[str, Any]) -> None:
    adaptation = adapted(models["roberta"], "lora", init="pissa")
    assert adaptation.adapter == 36_864 * R
    assert {site.rank for site in adaptation.sites} == {2 * R}
