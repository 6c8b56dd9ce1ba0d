"""Exports: PEFT reads them and gives our logits, head included; what the files say; what can't be exported."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from tests.support import models_fixtures as fixtures
from tests.support import reference, tiny

LABELS = 3


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a randomly drawn torch classifier of each family, written once."""
    folders: dict[str, Path] = {}

    def written(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            fixtures.torch_model(family, "sequence-classification", LABELS).save_pretrained(folders[family])
        return folders[family]

    return written


def adapted(folder: Path, **settings: Any) -> Any:
    """The model of `folder` with adapters, factors and head drawn at random."""
    model = mj.from_pretrained(folder, num_labels=LABELS)
    mj.adapt(model, mj.MELoRAConfig(**({"n": 3, "modules_to_save": ["classifier"]} | settings)), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    state = nnx.state(model, nnx.Param)
    for _, variable in nnx.to_flat_state(state):
        variable[...] = jnp.asarray(0.3 * rng.normal(size=variable.shape), jnp.float32)
    nnx.update(model, state)
    return model


def logits(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model: model(**inputs))(model))


def peft_logits(base: Path, adapter: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    import peft

    model, _ = fixtures.torch_load(base, "sequence-classification")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # all others are errors: PEFT warns of keys that it misses
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return fixtures.torch_output(model, inputs)


QV = ["query", "value"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("roberta", {"r": 2, "targets": QV}),
    "mixed ranks and alphas": ("roberta", {"r": [1, 2, 4], "alpha": [3, 7, 16], "targets": QV}),
    "a rank and an n of a site's own": (
        "roberta",
        {
            "r": 1,
            "rank_pattern": {"1.attention.self.query": 4},
            "n_pattern": {"0.attention.self.value": 7},
            "targets": QV,
        },
    ),
    "shuffle": ("roberta", {"r": 3, "mixer": "shuffle", "targets": QV}),
    "all": ("roberta", {"r": 2, "mixer": "all", "targets": QV}),
    "LoRA": ("roberta", {"n": 1, "r": 4, "targets": r".*/0/.*(query|key|dense)"}),
    "rslora": ("roberta", {"r": [1, 1, 3], "scaling": "rslora", "targets": QV}),
    "total": (
        "roberta",
        {"r": 2, "scaling": "total", "targets": ["word_embeddings", "query"], "n_pattern": {"word_embeddings": 1}},
    ),
    "all biases": ("roberta", {"r": 2, "targets": QV, "bias": "all"}),
    "biases of adapted layers": ("roberta", {"r": 2, "targets": QV, "bias": "lora_only"}),
    "DoRA": ("roberta", {"n": 1, "r": 2, "targets": QV, "variant": "dora"}),
    "DoRA of minis": ("roberta", {"r": [1, 2, 4], "alpha": [3, 7, 16], "targets": QV, "variant": "dora"}),
    "AdaLoRA": ("roberta", {"r": 2, "targets": QV, "variant": "adalora"}),
    "PiSSA": ("roberta", {"r": [1, 2, 3], "targets": QV, "init": "pissa"}),
    "BERT, its pooler beside": ("bert", {"r": [1, 2, 1], "targets": QV, "modules_to_save": ["pooler", "classifier"]}),
    "DistilBERT": ("distilbert", {"targets": ["q_lin", "v_lin"], "modules_to_save": ["pre_classifier", "classifier"]}),
}


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_peft_reads_the_export_and_gives_our_logits(name: str, base: Any, tmp_path: Path) -> None:
    family, settings = CASES[name]
    folder, inputs = base(family), fixtures.batch(family)
    model = adapted(folder, **settings)
    ours = logits(model, inputs)
    theirs = peft_logits(folder, mj.export_peft(model, tmp_path / "adapter"), inputs)
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5)
    without = logits(mj.from_pretrained(folder, num_labels=LABELS), inputs)
    assert abs(ours - without).max() > 0.01


def exported(tmp_path: Path, **settings: Any) -> tuple[tiny.Encoder, dict[str, Any], dict[str, np.ndarray]]:
    model = tiny.adapted(**settings)
    folder = mj.export_peft(model, tmp_path / "adapter")
    facts = json.loads((folder / "adapter_config.json").read_text())
    return model, facts, load_file(folder / "adapter_model.safetensors")


def test_the_files_of_a_small_model(tmp_path: Path) -> None:
    model: Any = tiny.adapted(r=[1, 2], alpha=[16, 32], targets=["query"], dropout=0.1)
    model.name_or_path, model.task = "some/base", "sequence-classification"
    folder = mj.export_peft(model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "some/base",
        "r": 3,
        "lora_alpha": 48,
        "lora_dropout": 0.1,
        "target_modules": ["query"],
        "modules_to_save": ["classifier"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        "base_model.model.classifier.bias": ((3,), np.float32),
        "base_model.model.classifier.weight": ((3, 6), np.float32),
        "base_model.model.layer.0.query.lora_A.weight": ((3, 6), np.float32),
        "base_model.model.layer.0.query.lora_B.weight": ((10, 3), np.float32),
        "base_model.model.layer.1.query.lora_A.weight": ((3, 6), np.float32),
        "base_model.model.layer.1.query.lora_B.weight": ((10, 3), np.float32),
    }
    own = mj.save_adapter(model, tmp_path / "own")
    assert (folder / "melora_config.json").read_text() == (own / "melora_config.json").read_text()


DELTAS: list[dict[str, Any]] = [
    {"r": [1, 2], "alpha": [16, 32]},
    {"r": [1, 2], "alpha": [3, 5], "scaling": "rslora"},
    {"r": 2, "scaling": "total", "rank_pattern": {"1.value": [1, 4]}},
    {"r": 4, "mixer": "shuffle", "alpha": [3, 5]},
    {"r": 3, "mixer": "all", "alpha": [3, 5]},
]


@pytest.mark.parametrize("settings", DELTAS)
def test_the_factors_in_the_file_multiply_to_the_update(settings: dict[str, Any], tmp_path: Path) -> None:
    model, facts, tensors = exported(tmp_path, **settings)
    for k, block in enumerate(model.layer):
        for name in ("query", "value"):
            layer, stem = getattr(block, name), f"base_model.model.layer.{k}.{name}"
            lora_a, lora_b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
            assert len(lora_a) == facts["r"]
            a = [np.asarray(x)[:, :r] for x, r in zip(layer.a[...], layer.spec.r, strict=True)]
            b = [np.asarray(x)[:r] for x, r in zip(layer.b[...], layer.spec.r, strict=True)]
            expected = reference.delta(a, b, layer.spec.scales, layer.spec.mixer)
            delta = (lora_b.astype(np.float64) @ lora_a).T * facts["lora_alpha"] / facts["r"]
            np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-6 * abs(expected).max(), err_msg=stem)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query", "value"], ["query", "value"]),
        (["0.query", "out"], ["layer.0.query", "layer.0.out", "layer.1.out"]),
    ],
)
def test_a_name_that_an_unadapted_layer_shares_is_written_whole(targets: Any, expected: Any, tmp_path: Path) -> None:
    _, facts, _ = exported(tmp_path, targets=targets)
    assert sorted(facts["target_modules"]) == sorted(expected)


def test_the_rank_that_vllm_must_be_told_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "melora_jax"):
        exported(tmp_path, r=[4, 5], targets=["0.query"])
        exported(tmp_path, r=300, targets=["0.query"])
    limit = "rank 600, above vLLM's limit of 512; merge the model to serve it there"
    assert caplog.messages == [
        "exported at rank 9; vLLM serves it with --max-lora-rank 16",
        f"exported as plain LoRA, these adapters have {limit}",
        f"exported at {limit}",
    ]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "WARNING"]


def test_what_can_not_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there is no adapted layer to export, PEFT needs one; keep a head alone wi"):
        exported(tmp_path, targets=())
    unknown: Any = "dora"
    with pytest.raises(ValueError, match=r"^format='dora' is unknown; choose \"lora\" or \"bdlora\"$"):
        mj.export_peft(tiny.adapted(), tmp_path / "adapter", format=unknown)
    assert not list(tmp_path.iterdir())
