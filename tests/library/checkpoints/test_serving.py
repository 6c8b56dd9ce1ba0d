"""Plain exports against the rules of those who serve them, and what we say of who serves what."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from melora_jax.checkpoints.peft.servers import readers
from melora_jax.core.report import served_rank
from tests.library.checkpoints import serving_rules as rules
from tests.support.decoder_fixtures import random_decoder

pytestmark = pytest.mark.slow

MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}
QV = ["q_proj", "v_proj"]
EXPORTS: dict[str, dict[str, Any]] = {
    "identity": {"r": 3, "targets": QV},
    "mixed ranks": {"r": [1, 3], "alpha": [5, 7], "targets": "all-linear"},
    "unlike sites": {"r": 1, "rank_pattern": {"0.self_attn.q_proj": 4}, "alpha_pattern": {"v_proj": 3}, "targets": QV},
    "shuffle": {"r": 4, "mixer": "shuffle", "targets": QV},
    "all, rslora": {"r": 2, "mixer": "all", "scaling": "rslora", "targets": QV},
    "total": {"r": 2, "scaling": "total", "targets": ["down_proj"]},
    "some layers": {"r": 2, "layers": [1], "targets": QV},
    "wide": {"r": 20, "targets": ["q_proj"]},
}


def exported(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    model = random_decoder("llama")
    mj.adapt(model, mj.MELoRAConfig(**({"n": 2} | settings)), rngs=nnx.Rngs(0))
    mj.export_peft(model, folder)
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", EXPORTS)
def test_every_plain_export_keeps_the_rules_of_all(name: str, tmp_path: Path) -> None:
    config, tensors = exported(tmp_path / "peft", **EXPORTS[name])
    rank = served_rank(config["r"])
    assert rank is not None
    assert rules.vllm(config, tensors, rank, MODULES) == []
    assert rules.sglang(config, tensors, config["r"]) == []
    assert rules.llama_cpp(config, tensors, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)) == []
    assert all(reader.serves for reader in readers(config, {key: value.shape for key, value in tensors.items()}))


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
FACTORS = {"base_model.model.q_proj.lora_A.weight": (4, 6), "base_model.model.q_proj.lora_B.weight": (6, 4)}
HEAD = {"base_model.model.classifier.weight": (2, 6)}
DEEP_HEAD = {"base_model.model.classifier.dense.weight": (6, 6)}
EMBEDDING = {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 6)}
WHOLE = {"base_model.model.lm_head.weight": (9, 6)}
# which of vLLM, SGLang and llama.cpp serve it, and what is said of one that does not
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "plain": ({}, {}, "vLLM SGLang llama.cpp", ""),
    "rsLoRA": ({"use_rslora": True}, {}, "vLLM", "SGLang: no, it ignores use_rslora, so its scale would be wrong"),
    "ranks": ({"rank_pattern": {"q": 9}}, {}, "vLLM", "llama.cpp: no, its converter ignores rank_pattern, so its"),
    "DoRA": ({"use_dora": True}, {}, "", "vLLM: no, it refuses use_dora"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, {}, "", "vLLM: no, it refuses use_bdlora"),
    "biases": ({"bias": "all"}, {}, "SGLang llama.cpp", "vLLM: no, it refuses bias='all'"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        {},
        "SGLang llama.cpp",
        "vLLM: no, it refuses init_lora_weights=",
    ),
    "too wide": ({"r": 513}, {}, "SGLang llama.cpp", "vLLM: no, rank 513 is above its limit of 512"),
    "a pattern": (
        {"target_modules": ".*q"},
        {},
        "vLLM llama.cpp",
        "SGLang: no, it takes a list of target_modules, not",
    ),
    "a head": ({"task_type": "SEQ_CLS"}, HEAD, "vLLM", "SGLang: no, it ignores classifier.weight, which was trained"),
    "RoBERTa's head": (
        {"task_type": "SEQ_CLS"},
        DEEP_HEAD,
        "",
        "vLLM: no, of whole modules it reads a flat classifier or",
    ),
    "an embedding": ({}, EMBEDDING, "vLLM SGLang llama.cpp", ""),
    "lm_head": ({}, WHOLE, "", "llama.cpp: no, its converter refuses lm_head.weight, which is not a LoRA factor"),
    "a classifier": ({"task_type": "SEQ_CLS"}, {}, "vLLM SGLang", "llama.cpp: no, it runs language models alone"),
}


@pytest.mark.parametrize("name", CASES)
def test_who_serves_an_adapter_and_why_not(name: str) -> None:
    changes, more, expected, said = CASES[name]
    config, shapes = PLAIN | changes, FACTORS | more
    found = readers(config, shapes)
    assert [reader.name for reader in found] == ["PEFT", "vLLM", "SGLang", "llama.cpp"]
    assert " ".join(reader.name for reader in found[1:] if reader.serves) == expected
    assert said in "\n".join(map(str, found))
    tensors = {key: np.zeros(shape) for key, shape in shapes.items()}
    assert ("vLLM" in expected) == (rules.vllm(config, tensors, 512, MODULES) == [])


def test_the_authors_files_are_served_after_import_alone() -> None:
    assert not any(reader.serves for reader in readers({"peft_type": "MELORA"}, {}))


@pytest.mark.parametrize(("r", "warned"), [(8, False), (300, True)])
def test_a_rank_that_vllm_can_not_serve_is_said_before_training(
    r: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_decoder("llama")
    with caplog.at_level(logging.WARNING, "melora_jax"):
        mj.adapt(model, mj.MELoRAConfig(n=2, r=r, targets=["q_proj"]), rngs=nnx.Rngs(0))
    expected = (
        "exported as plain LoRA, these adapters have rank 600, above vLLM's limit of 512; merge the model to serve"
    )
    assert (expected in caplog.text) == warned
    assert bool(caplog.messages) == warned
