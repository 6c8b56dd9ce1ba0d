"""What of the base is trained itself: biases (BitFit), all of it (full fine-tuning); files, merging, PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.adapters import Adaptation, BaseParam
from melora_jax.models.auto import model_from_config
from tests.support import tiny

pytestmark = pytest.mark.slow

BERT = {
    "model_type": "bert",
    "vocab_size": 13,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 7,
    "max_position_embeddings": 11,
}

BASES: dict[str, dict[str, Any]] = {
    "BitFit": {"targets": (), "bias": "all"},
    "biases of all layers": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "full": {"targets": (), "train_base": True},
}


def moved(model: Any) -> Any:
    """The model with another value of everything that is trained."""
    state = nnx.state(model, nnx.Param)
    for number, (_, variable) in enumerate(nnx.to_flat_state(state)):
        rng = np.random.default_rng(number)
        variable[...] = variable[...] + jnp.asarray(0.3 * rng.normal(size=variable.shape), variable.dtype)
    nnx.update(model, state)
    return model


def bert(dtype: str = "float32") -> Any:
    return model_from_config(BERT, task="sequence-classification", num_labels=3, dtype=dtype, rngs=nnx.Rngs(0))


def trained_bert(dtype: str = "float32", **settings: Any) -> tuple[Any, Adaptation]:
    model = bert(dtype)
    usual = {"n": 3, "targets": ["query", "value"], "modules_to_save": ["classifier"]}
    adaptation = mj.adapt(model, mj.MELoRAConfig(**(usual | settings)), rngs=nnx.Rngs(1))
    return moved(model), adaptation


def base_paths(model: Any) -> set[str]:
    return {path.replace("/base/", "/") for path in tiny.arrays(model, BaseParam)}


def test_which_parameters_are_trained() -> None:
    every = set(tiny.arrays(bert(), nnx.Param))
    head = {path for path in every if path.startswith("classifier/")}
    biases = {path for path in every if path.endswith("/bias")} - head
    assert len(biases) == 1 + 2 * (4 + 1 + 2 + 1) + 1  # norms, projections and halves, pooler
    expected = {
        "BitFit": biases,
        "biases of all layers": biases,
        "biases of adapted layers": {path for path in biases if path.endswith(("query/bias", "value/bias"))},
        "full": every - head,
    }
    for name, settings in BASES.items():
        model, adaptation = trained_bert(**settings)
        assert base_paths(model) == expected[name], name
        assert set(tiny.arrays(model, nnx.All(nnx.Param, nnx.Not(mj.MELoRAParam), nnx.Not(BaseParam)))) == head
        counts = tiny.arrays(bert(), nnx.Param)
        assert adaptation.base == sum(counts[path].size for path in expected[name])
        assert adaptation.frozen == sum(value.size for value in counts.values()) - adaptation.base - adaptation.head
        assert adaptation.trainable == adaptation.adapter + adaptation.base + adaptation.head
        assert adaptation == mj.describe(model)
        assert f" + base {adaptation.base:,} + head" in str(adaptation)


@pytest.mark.parametrize("name", BASES)
def test_the_optimizer_changes_that_and_nothing_else(name: str) -> None:
    model, _ = trained_bert(**BASES[name])
    before = tiny.arrays(model)
    trained = set(tiny.arrays(model, nnx.Param))
    tx = mj.make_optimizer(model, optax.constant_schedule(1e-2), head_learning_rate=1e-4, weight_decay=0.0)
    step = mj.make_train_step(model, tx, lambda model, ids: model(ids).mean() ** 2)
    state, frozen = mj.train_state(model, tx)
    state, _ = step(state, frozen, tiny.IDS, jax.random.key(0))
    nnx.update(model, state.trainable)
    after = tiny.arrays(model)
    changed = {path: abs(after[path] - value).max() for path, value in before.items() if (after[path] != value).any()}
    assert set(changed) <= trained
    assert changed["classifier/kernel"] == pytest.approx(1e-4, rel=1e-2)
    base = [change for path, change in changed.items() if path.endswith("intermediate/dense/bias")]
    assert base == ([] if name == "biases of adapted layers" else pytest.approx([1e-2] * 2, rel=1e-2))


@pytest.mark.parametrize("name", BASES)
def test_files_and_merging_keep_it(name: str, tmp_path: Path) -> None:
    model, adaptation = trained_bert(**BASES[name])
    y = tiny.run(model, tiny.IDS)
    merged = mj.merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(bert())
    np.testing.assert_allclose(tiny.run(merged, tiny.IDS), y, rtol=0, atol=1e-5)
    bare = tiny.arrays(mj.unwrap(model))
    assert all(
        np.array_equal(bare[path.replace("/base/", "/")], v) for path, v in tiny.arrays(model, BaseParam).items()
    )
    mj.save_adapter(model, tmp_path / "adapter")
    fresh = bert()
    assert mj.load_adapter(fresh, tmp_path / "adapter") == adaptation
    tiny.assert_equal(tiny.arrays(fresh), tiny.arrays(model))
    if name in ("BitFit", "full"):
        mj.save_pretrained(model, tmp_path / "model")
        loaded = mj.from_pretrained(tmp_path / "model", num_labels=3)
        np.testing.assert_allclose(tiny.run(loaded, tiny.IDS), y, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match=r"there is no adapted layer to export"):
            mj.export_peft(model, tmp_path / "peft")
    else:
        imported = bert()
        mj.import_peft(imported, mj.export_peft(model, tmp_path / "peft"))
        tiny.assert_equal(tiny.arrays(imported), tiny.arrays(model))


@pytest.mark.parametrize("name", ["BitFit", "full"])
def test_a_bfloat16_base_is_trained_in_float32_and_given_back_as_it_was(name: str) -> None:
    model = tiny.Encoder(dtype=jnp.bfloat16)
    before = {path: value.dtype for path, value in tiny.arrays(model).items()}
    mj.adapt(model, tiny.config(**BASES[name]), rngs=nnx.Rngs(1))
    assert {value.dtype for value in tiny.arrays(model, nnx.Param).values()} == {np.dtype("float32")}
    moved(model)
    merged = tiny.arrays(mj.merge(model))
    head = {path for path in before if path.startswith("classifier/")}
    assert {path: value.dtype for path, value in merged.items() if path not in head} == {
        path: dtype for path, dtype in before.items() if path not in head
    }
    trained = tiny.arrays(model, BaseParam)
    for path, value in trained.items():
        np.testing.assert_array_equal(merged[path], value.astype(before[path]), err_msg=path)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads what transformers is about to rename
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_trained_in_peft_are_read(bias: Any, tmp_path: Path) -> None:
    import peft
    import torch
    import transformers

    mj.save_pretrained(bert(), tmp_path / "base")
    host = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    settings = peft.LoraConfig(
        r=2, target_modules=["query", "value"], bias=bias, modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    theirs = peft.get_peft_model(host, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=generator))
        y = theirs.eval()(torch.from_numpy(np.array(tiny.IDS)).long()).logits.numpy()
    theirs.save_pretrained(tmp_path / "peft")
    model = mj.from_pretrained(tmp_path / "base", num_labels=3)
    mj.import_peft(model, tmp_path / "peft")
    assert model.melora_config.bias == bias
    np.testing.assert_allclose(tiny.run(model, tiny.IDS), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "some"}, "bias='some' is unknown; choose 'none' or 'all' or 'lora_only'"),
        ({"train_base": True}, "train_base trains all of the base, so targets=.* adds nothing; leave one of them out"),
        ({"targets": (), "train_base": True, "bias": "all"}, "so bias='all' adds nothing"),
        ({"targets": (), "bias": "lora_only"}, "trains the biases of adapted layers, and targets is empty; take"),
        ({"train_base": 1, "targets": ()}, "train_base=1 must be True or False"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(**settings)


def test_models_that_can_not_be_trained_so_are_refused() -> None:
    bare = nnx.Sequential(nnx.List([nnx.Linear(128, 24, use_bias=False, rngs=nnx.Rngs(0))]))
    with pytest.raises(ValueError, match=r'bias="all" finds no bias in this model'):
        mj.adapt(bare, mj.MELoRAConfig(targets=(), bias="all"), rngs=nnx.Rngs(0))
    mj.quantize(bare, "int8")
    with pytest.raises(ValueError, match=r"train_base would train .*, which is quantised to int8"):
        mj.adapt(bare, mj.MELoRAConfig(targets=(), train_base=True), rngs=nnx.Rngs(0))
    for build in (_raw, _linen):
        for settings, word in (
            ({"bias": "all"}, "bias"),
            ({"variant": "dora"}, "variant"),
            ({"init": "pissa"}, "init"),
        ):
            with pytest.raises(
                ValueError, match=rf"{word}='.*' is for NNX models; melora_jax\.(functional|linen) holds plain ad"
            ):
                build(mj.MELoRAConfig(n=1, targets="all-linear", **settings))


def _raw(config: mj.MELoRAConfig) -> None:
    from melora_jax import functional

    functional.init({"query": jnp.ones((6, 4))}, config, jax.random.key(0))


def _linen(config: mj.MELoRAConfig) -> None:
    from flax import linen

    from melora_jax.linen import adapt

    model, x = linen.Dense(4), jnp.ones((1, 6))
    adapt(model, model.init(jax.random.key(0), x), config, jax.random.key(0), x)
