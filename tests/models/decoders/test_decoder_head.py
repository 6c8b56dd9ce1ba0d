"""Decoders as classifiers: transformers and PEFT as oracles, the heads of other tasks, what is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from melora_jax.__main__ import main as melora_jax
from tests.support.decoder_fixtures import (
    CONFIGS,
    FAMILIES,
    apply,
    checkpoint,
    padded,
    random_decoder,
    token_ids,
    torch_decoder,
)
from tests.support.decoder_fixtures import torch_run as run_torch
from tests.support.models_fixtures import tensors_of, write_checkpoint
from tests.support.tiny_run import DECODER_SIZES, make_material, recipe
from train.__main__ import main as train

TASK, LABELS = "sequence-classification", 5
Q_AND_V = mj.MELoRAConfig(n=2, r=3, alpha=5.0, targets=["q_proj", "v_proj"], modules_to_save=["score"])


def classifier(name: str):
    return random_decoder(name, task=TASK, num_labels=LABELS)


def adapted(model):
    """The model with adapters and a head that have been trained."""
    mj.adapt(model, Q_AND_V, rngs=nnx.Rngs(3))
    drawn = np.random.default_rng(9)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable.set_value(variable[...] + 0.2 * drawn.standard_normal(variable.shape).astype("f"))
    return model


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_logits_equal_those_of_transformers(tmp_path, name):
    model = classifier(name)
    mj.save_pretrained(model, tmp_path)
    reference, info = torch_decoder(tmp_path, TASK)
    assert not any(info.values()), info
    assert [type(reference).__name__] == model.config["architectures"]
    ids, mask, positions = padded()
    found = np.asarray(apply(mj.from_pretrained(tmp_path), ids, mask))
    assert found.shape == (3, LABELS)
    np.testing.assert_allclose(found, run_torch(reference, ids, mask, positions), rtol=0, atol=1e-5)
    np.testing.assert_allclose(apply(model, token_ids()), run_torch(reference, token_ids()), rtol=0, atol=1e-5)
    assert np.ptp(found, axis=0).mean() > 0.5


def test_the_head_reads_the_last_token_that_is_seen():
    model = classifier("mistral")
    ids, mask, _ = padded()
    hidden = np.asarray(model.model(ids, mask))
    last = hidden[[0, 1, 2], [18, 18, 11]]  # full, padded left, padded right by 7 of 19
    np.testing.assert_allclose(model(ids, mask), last @ np.asarray(model.score.kernel), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(model(ids), model.score(model.model(ids)[:, -1]))
    bfloat16 = random_decoder("llama", task=TASK, num_labels=LABELS, dtype="bfloat16")
    assert (bfloat16.score.kernel.dtype, bfloat16(ids).dtype) == ("bfloat16", "float32")


def test_a_language_model_gets_a_head_of_its_own_and_back(tmp_path):
    checkpoint(tmp_path / "lm", "llama")
    model = mj.from_pretrained(tmp_path / "lm", num_labels=3, rngs=nnx.Rngs(4))
    assert model.load_report.ignored == (("lm_head.weight", "head of another task"),)
    assert model.load_report.initialised == ("score/kernel",)
    assert model.score.kernel.shape == (42, 3)
    assert 0.2 < float(np.std(model.score.kernel)) < 0.4  # initializer_range is 0.3
    mj.save_pretrained(classifier("smollm2"), tmp_path / "tied")
    again = mj.from_pretrained(tmp_path / "tied", task="causal-lm")
    assert again.load_report.ignored == (("score.weight", "head of another task"),)
    mj.save_pretrained(model, tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        mj.from_pretrained(tmp_path / "classifier", task="causal-lm")


def test_the_score_of_a_token_classifier_is_not_taken(tmp_path):
    model = classifier("llama")
    tensors = tensors_of(model) | {"score.bias": np.zeros(LABELS, "f")}
    write_checkpoint(tmp_path, CONFIGS["llama"] | {"architectures": ["LlamaForTokenClassification"]}, tensors)
    loaded = mj.from_pretrained(tmp_path, num_labels=LABELS)
    assert dict(loaded.load_report.ignored) == dict.fromkeys(("score.bias", "score.weight"), "head of another task")
    assert not np.array_equal(loaded.score.kernel, model.score.kernel)


def test_a_head_of_another_number_of_labels_is_refused(tmp_path):
    mj.save_pretrained(classifier("llama"), tmp_path)
    with pytest.raises(ValueError, match=rf"the head score\.weight in .* has {LABELS} outputs, .* asked for has 3"):
        mj.from_pretrained(tmp_path, num_labels=3)


def test_token_types_are_refused():
    with pytest.raises(ValueError, match="decoders have no token types"):
        classifier("llama")(token_ids(), None, token_ids())


@pytest.mark.parametrize(("task", "outputs"), [("regression", 1), (TASK, LABELS)])
def test_stacked_and_rematerialised_it_is_the_same(task, outputs):
    model = random_decoder("gemma2", task=task, num_labels=outputs)
    ids, mask, _ = padded()
    expected = apply(adapted(model), ids, mask)
    assert expected.shape == (3, outputs)
    other = random_decoder("gemma2", task=task, num_labels=outputs, remat="full")
    np.testing.assert_allclose(apply(adapted(other), ids, mask), expected, rtol=0, atol=1e-5)
    mj.stack_layers(model)
    np.testing.assert_allclose(apply(model, ids, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["smollm2", "gemma3_text"])
def test_peft_reads_the_export_and_we_read_it_back(tmp_path, name):
    import peft

    mj.save_pretrained(classifier(name), tmp_path / "base")
    model = adapted(mj.from_pretrained(tmp_path / "base"))
    mj.export_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    reference, _ = torch_decoder(tmp_path / "base", TASK)
    ids, mask, positions = padded()
    before = run_torch(reference, ids, mask, positions)
    tuned = peft.PeftModel.from_pretrained(reference, tmp_path / "peft").eval()
    assert type(tuned).__name__ == "PeftModelForSequenceClassification"
    expected = run_torch(tuned, ids, mask, positions)
    assert np.abs(expected - before).max() > 0.3
    np.testing.assert_allclose(apply(model, ids, mask), expected, rtol=0, atol=2e-5)
    again = mj.from_pretrained(tmp_path / "base")
    mj.import_peft(again, tmp_path / "peft")
    np.testing.assert_array_equal(apply(again, ids, mask), apply(model, ids, mask))


def test_the_commands_merge_and_compress_it(tmp_path):
    checkpoint(tmp_path / "base", "llama")
    model = adapted(mj.from_pretrained(tmp_path / "base", num_labels=LABELS))
    mj.save_adapter(model, tmp_path / "adapter")
    assert melora_jax(["merge", f"{tmp_path}/adapter", f"{tmp_path}/merged"]) == 0
    merged = mj.from_pretrained(tmp_path / "merged")
    ids, mask, _ = padded()
    assert (merged.task, merged.num_labels) == (TASK, LABELS)
    np.testing.assert_allclose(apply(merged, ids, mask), apply(model, ids, mask), rtol=0, atol=2e-5)
    base = ["--base", f"{tmp_path}/base", "--n", "2", "--r", "3"]
    assert melora_jax(["compress", f"{tmp_path}/merged", f"{tmp_path}/nearest", *base]) == 0
    nearest = mj.from_pretrained(tmp_path / "base", num_labels=LABELS)
    mj.load_adapter(nearest, tmp_path / "nearest")
    np.testing.assert_allclose(apply(nearest, ids, mask), apply(model, ids, mask), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_a_run_trains_it_and_exports_the_head(tmp_path, capsys):
    material = make_material(tmp_path, DECODER_SIZES)
    words = ["--adapter.targets", "q_proj", "v_proj", "--adapter.modules_to_save", "score", "--adapter.n", "2"]
    run = tmp_path / "run"
    words += ["--train.epochs", "12", "--optim.learning_rate", "0.03", "--model.remat", "full"]
    code = train(["run", str(recipe(material)), *words, "--output.folder", str(run)])
    assert code == 0, capsys.readouterr()
    losses = [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.7 * losses[0], losses
    head = next(name for name in load_file(run / "peft" / "adapter_model.safetensors") if "score" in name)
    assert re.fullmatch(r"base_model\.model\.score\.(modules_to_save\.)?weight", head)
