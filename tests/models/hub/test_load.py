"""Checkpoints of every shape, read and written; transformers is the oracle where it is installed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.files.safetensors_io import write_tensors
from melora_jax.models import abstract_model, open_checkpoint
from melora_jax.models.hub.names import torch_name
from melora_jax.nn.tree import variables_of
from melora_jax.training import check_mesh
from tests.support.models_fixtures import (
    CONFIGS,
    FAMILIES,
    batch,
    random_model,
    tensors_of,
    torch_load,
    torch_model,
    torch_output,
    write_checkpoint,
)

PREFIX = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "distilbert": "distilbert."}


def same(found, expected) -> bool:
    """Whether two models have the same variables, bit for bit."""
    a, b = tensors_of(found), tensors_of(expected)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and (a[name] == b[name]).all() for name in a)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def bert():
    return random_model("bert", num_labels=5)


@pytest.fixture
def folder(tmp_path, bert) -> Path:
    """A BERT classifier with 5 labels, to be damaged."""
    mj.save_pretrained(bert, tmp_path / "bert")
    return tmp_path / "bert"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# what loads


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["sequence-classification", "regression", "encoder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path, family, task, dtype):
    model = random_model(family, task=task, dtype=dtype)
    mj.save_pretrained(model, tmp_path / "saved")
    loaded = mj.from_pretrained(tmp_path / "saved", task=task, dtype=dtype)
    assert same(loaded, model)
    assert loaded.config == model.config
    assert loaded.load_report.initialised == loaded.load_report.ignored == ()


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("task", "labels"), [("sequence-classification", 5), ("regression", 1), ("encoder", None)])
def test_transformers_loads_what_was_saved(tmp_path, family, task, labels):
    model = random_model(family, task=task, num_labels=labels)
    mj.save_pretrained(model, tmp_path / "saved")
    loaded, info = torch_load(tmp_path / "saved", task)
    assert not any(info.values()), info
    assert type(loaded).__name__ == model.config["architectures"][0]
    inputs = batch(family)
    valid = inputs["attention_mask"] == 1 if task == "encoder" else slice(None)
    expected = np.asarray(model(*inputs.values()))[valid]
    np.testing.assert_allclose(torch_output(loaded, inputs)[valid], expected, rtol=0, atol=5e-6)
    if labels:
        assert loaded.config.num_labels == labels


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_takes_over_the_dtype(tmp_path, dtype):
    mj.save_pretrained(random_model("roberta", dtype=dtype), tmp_path / "saved")
    loaded, _ = torch_load(tmp_path / "saved", "sequence-classification")
    assert str(loaded.dtype) == f"torch.{dtype}"


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "source"),
    [
        ("bert", "BertForPreTraining"),
        ("bert", "BertForMaskedLM"),
        ("bert", "BertForTokenClassification"),
        ("roberta", "RobertaForMaskedLM"),
        ("roberta", "RobertaModel"),
        ("xlm-roberta", "XLMRobertaForMaskedLM"),
        ("xlm-roberta", "XLMRobertaForQuestionAnswering"),
        ("distilbert", "DistilBertForMaskedLM"),
        ("distilbert", "DistilBertForQuestionAnswering"),
    ],
)
@pytest.mark.parametrize("task", ["sequence-classification", "encoder"])
def test_other_heads_load_as_in_transformers(tmp_path, family, source, task):
    import torch
    import transformers

    torch.manual_seed(0)
    values = {key: value for key, value in CONFIGS[family].items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(family, **values)
    getattr(transformers, source)(config).save_pretrained(tmp_path)
    model = mj.from_pretrained(tmp_path, task=task)
    reference, info = torch_load(tmp_path, task)
    drawn = {torch_name(path) for path in model.load_report.initialised}
    left_out = {name for name, _ in model.load_report.ignored}
    if source == "BertForTokenClassification" and task != "encoder":
        # transformers takes the token classifier for the sequence classifier, since their names and shapes agree
        assert drawn == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
        assert left_out == {"classifier.weight", "classifier.bias"}
        return
    assert drawn == set(info["missing_keys"])
    assert left_out == set(info["unexpected_keys"])
    found, expected = tensors_of(model), reference.state_dict()
    for name in found.keys() - drawn:
        np.testing.assert_array_equal(found[name], expected[name].numpy())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["sequence-classification", "encoder"])
def test_prefix_and_legacy_names_and_buffers(tmp_path, family, task):
    model = random_model(family, task=task)
    tensors = tensors_of(model)
    for style in ("with prefix", "without", "legacy"):
        renamed = {}
        for name, tensor in tensors.items():
            plain = name.removeprefix(PREFIX[family])
            if style == "legacy" and re.search(r"(LayerNorm|layer_norm)\.", name):
                plain = plain.replace(".weight", ".gamma").replace(".bias", ".beta")
            in_body = not name.startswith(("classifier", "pre_classifier"))
            renamed[PREFIX[family] + plain if style == "with prefix" and in_body else plain] = tensor
        prefix = PREFIX[family] if style == "with prefix" else ""
        renamed[f"{prefix}embeddings.position_ids"] = np.arange(17)[None]
        loaded = mj.from_pretrained(write_checkpoint(tmp_path / style, CONFIGS[family], renamed), task=task)
        assert same(loaded, model)
        buffer = f"{prefix}embeddings.position_ids"
        assert loaded.load_report.ignored == ((buffer, "buffer, computed on the fly"),)


def test_configurations_of_transformers_4_and_5(tmp_path, bert):
    tensors = tensors_of(bert)
    labels = {"id2label": {str(i): f"L{i}" for i in range(5)}, "label2id": {f"L{i}": i for i in range(5)}}
    style_4 = {"torch_dtype": "float32", "transformers_version": "4.8.2", "gradient_checkpointing": False} | labels
    style_4 |= {"position_embedding_type": "absolute", "_name_or_path": "x", "architectures": ["BertForMaskedLM"]}
    style_5 = {"dtype": "float32", "transformers_version": "5.23.0", "is_decoder": False} | labels
    first = mj.from_pretrained(write_checkpoint(tmp_path / "4", CONFIGS["bert"] | style_4, tensors), dtype="bfloat16")
    second = mj.from_pretrained(write_checkpoint(tmp_path / "5", CONFIGS["bert"] | style_5, tensors), dtype="bfloat16")
    assert first.config["torch_dtype"] == second.config["dtype"] == "bfloat16"
    assert "dtype" not in first.config
    assert "torch_dtype" not in second.config
    assert first.config["id2label"] == second.config["id2label"] == labels["id2label"]
    assert same(second, mj.from_pretrained(tmp_path / "5", dtype="bfloat16", num_labels=5))
    only_a_number = write_checkpoint(tmp_path / "n", CONFIGS["bert"] | {"num_labels": 5}, tensors)
    assert same(mj.from_pretrained(only_a_number), bert)


@pytest.mark.parametrize("stored", [np.float16, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_dtypes_are_converted(tmp_path, bert, stored, dtype):
    tensors = {name: tensor.astype(stored) for name, tensor in tensors_of(bert).items()}
    write_checkpoint(tmp_path, bert.config, tensors)
    loaded = tensors_of(mj.from_pretrained(tmp_path, dtype=dtype))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor.astype(jnp.dtype(dtype)), strict=True)


@pytest.mark.parity
def test_a_sharded_checkpoint_of_transformers(tmp_path):
    reference = torch_model("roberta", "sequence-classification", 5)
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    sharded = mj.from_pretrained(tmp_path / "sharded")
    assert same(sharded, mj.from_pretrained(tmp_path / "whole"))
    assert len(sharded.load_report.files) > 2


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", ["classifier/bias", "classifier/kernel"]),
        ("roberta", [f"classifier/{layer}/{leaf}" for layer in ("dense", "out_proj") for leaf in ("bias", "kernel")]),
        (
            "distilbert",
            [f"{layer}/{leaf}" for layer in ("classifier", "pre_classifier") for leaf in ("bias", "kernel")],
        ),
    ],
)
def test_a_missing_head_is_drawn_and_said(tmp_path, caplog, family, expected):
    config = CONFIGS[family] | {"initializer_range": 0.4}
    write_checkpoint(tmp_path, config, tensors_of(random_model(family, task="encoder")))
    with caplog.at_level(logging.INFO, "melora_jax"):
        model = mj.from_pretrained(tmp_path, num_labels=997, dtype="bfloat16")
    assert model.load_report.initialised == tuple(expected)
    assert f"has no {', '.join(expected)}: drawn at random, train it before use" in caplog.text
    assert [record.levelname for record in caplog.records if "drawn at random" in record.message] == ["WARNING"]
    assert all(path in str(model.load_report) for path in expected)
    variables = variables_of(model)
    for path in expected:
        value = np.asarray(variables[path].get_value(), np.float32)
        assert variables[path].dtype == jnp.bfloat16
        assert value.std() == 0 if path.endswith("bias") else abs(value.std() - 0.4) < 0.05
    again, other = (mj.from_pretrained(tmp_path, num_labels=997, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    head = expected[1].replace("/", ".").replace("kernel", "weight")
    np.testing.assert_array_equal(tensors_of(again)[head].astype(jnp.bfloat16), tensors_of(model)[head])
    assert (tensors_of(again)[head] != tensors_of(other)[head]).any()


def test_labels_and_origin_are_kept(folder):
    model = mj.from_pretrained(folder, label_names=["a", "b", "c", "d", "e"])
    assert (model.num_labels, model.task, model.name_or_path) == (5, "sequence-classification", str(folder))
    assert model.config["id2label"]["3"] == "d"
    assert mj.from_pretrained(folder, task="encoder").num_labels is None


def opened_files(monkeypatch) -> list[str]:
    """The names of the files that Python opens from here on."""
    names: list[str] = []
    whole = open

    def counted(file, *arguments, **options):
        names.append(Path(str(file)).name)
        return whole(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", counted)
    monkeypatch.setattr("io.open", counted)
    return names


def test_config_json_is_read_once(folder, tmp_path, monkeypatch):
    names = opened_files(monkeypatch)
    model = mj.from_pretrained(folder)
    assert names.count("config.json") == 1
    checkpoint = open_checkpoint(folder)
    abstract_model(checkpoint)
    assert same(mj.from_pretrained(checkpoint), model)
    check_mesh(checkpoint, mj.MELoRAConfig(n=3, targets=["query"]), mj.make_mesh(data=-1))
    assert names.count("config.json") == 2
    mj.save_pretrained(model, tmp_path / "saved")
    assert names.count("config.json") == 3  # written


@pytest.mark.slow
def test_a_loaded_model_trains_and_splits_like_any_other(folder):
    model = mj.from_pretrained(folder)
    inputs = batch("bert").values()
    loss, gradients = nnx.jit(nnx.value_and_grad(lambda model: (model(*inputs) ** 2).mean()))(model)
    assert loss > 0
    assert all(
        np.asarray(leaf).any() for leaf in (gradients.classifier.kernel, gradients.bert.embeddings.LayerNorm.bias)
    )
    assert hash(nnx.graphdef(model)) == hash(nnx.graphdef(mj.from_pretrained(folder)))


# what does not load


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    [
        "../part.safetensors",
        "/etc/part.safetensors",
        "sub/part.safetensors",
        "sub\\part.safetensors",
        "C:part.safetensors",
        "..",
        "",
        "part.bin",
        7,
        None,
    ],
)
def test_an_index_cannot_name_files_elsewhere(folder, name):
    (folder.parent / "part.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    write_index(folder, {"classifier.weight": name})
    with pytest.raises(ValueError, match=r"index.json names the file .*only a \*.safetensors in the same folder"):
        mj.from_pretrained(folder)


def test_an_index_that_contradicts_its_files_is_refused(folder, bert):
    names = list(tensors_of(bert))
    write_index(folder, dict.fromkeys(names, "part.safetensors"))
    assert same(mj.from_pretrained(folder), bert)
    index = folder / "model.safetensors.index.json"

    def refused(weight_map, message):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            mj.from_pretrained(folder)

    everything = dict.fromkeys(names, "part.safetensors")
    refused(everything | {"ghost.weight": "part.safetensors"}, "puts tensor ghost.weight in part.*, it is in no file")
    refused({names[0]: "part.safetensors"}, "puts tensor .* in no file, it is in part.safetensors")
    refused(everything | {names[0]: "gone.safetensors"}, "gone.safetensors does not exist")
    refused({}, "has no weight_map")
    refused([], "has no weight_map")
    write_tensors(folder / "twice.safetensors", {names[0]: tensors_of(bert)[names[0]]}, {})
    refused(everything | {names[0]: "twice.safetensors"}, f"{names[0]} is in both .*part.* and .*twice")


def test_pickled_weights_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    message = r"only pickled weights \(pytorch_model.bin\), and unpickling runs whatever code .*save_pretrained"
    with pytest.raises(FileNotFoundError, match=message) as error:
        mj.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_folders_without_a_model_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds neither .*, only model.fp16.safetensors; .*rename the file"):
        mj.from_pretrained(folder)
    (folder / "model.fp16.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="holds an adapter, not a model; load its base model first"):
        mj.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        mj.from_pretrained(folder)
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "../x"):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*; check its name, or give a hub id"):
            mj.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is a file; give the folder"):
        mj.from_pretrained(folder / "adapter_model.safetensors")


def test_a_truncated_file_is_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"bert/model.safetensors is truncated or is not a safetensors file"):
        mj.from_pretrained(folder)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
BROKEN = {
    f"lacks {QUERY}; check model_type": {QUERY: None},
    f"lacks {QUERY} and has {QUERY}_orig, which the model lacks": {QUERY: None, f"{QUERY}_orig": np.ones((21, 21))},
    r"lacks classifier.bias; check": {"classifier.bias": None},
    r"lacks bert.pooler.dense.weight; check": {"bert.pooler.dense.weight": None},
    r"holds bert.encoder.layer.2.output.dense.bias \(in model.safetensors\), for which the bert of its": {
        "bert.encoder.layer.2.output.dense.bias": np.ones(21)
    },
    rf"{QUERY} in .*model.safetensors has shape \[21, 20\], config.json asks for \[21, 21\]": {
        QUERY: np.ones((21, 20))
    },
    r"word_embeddings.weight in .* has shape \[99, 21\], config.json asks for \[101, 21\]": {
        "bert.embeddings.word_embeddings.weight": np.ones((99, 21))
    },
    rf"{QUERY} in .* is int8; quantised checkpoints are not supported": {QUERY: np.ones((21, 21), np.int8)},
    "holds bert.encoder.layer.0.output.dense.bias and encoder.layer.0.output.dense.bias, one tensor twice": {
        "encoder.layer.0.output.dense.bias": np.ones(21)
    },
}


@pytest.mark.parametrize("message", BROKEN)
def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path, bert, message):
    changed = tensors_of(bert) | BROKEN[message]
    write_checkpoint(tmp_path, bert.config, {name: tensor for name, tensor in changed.items() if tensor is not None})
    with pytest.raises(ValueError, match=message) as error:
        mj.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_many_missing_tensors_are_counted(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks bert.encoder.layer.2.* and 13 more; check model_type and"):
        mj.from_pretrained(folder)


def test_a_head_of_another_size_is_refused_with_the_ways_out(folder, tmp_path, bert):
    message = r"the head classifier.* in .* has 5 outputs, the sequence-classification asked for has 3; load it with"
    with pytest.raises(ValueError, match=message):
        mj.from_pretrained(folder, num_labels=3)
    with pytest.raises(ValueError, match="has 5 outputs, the regression asked for has 1"):
        mj.from_pretrained(folder, task="regression")
    assert same(mj.from_pretrained(folder, num_labels=5), bert)
    # the way out that the message gives
    mj.save_pretrained(mj.from_pretrained(folder, task="encoder"), tmp_path / "body")
    fresh = mj.from_pretrained(tmp_path / "body", num_labels=3)
    assert fresh.load_report.initialised == ("classifier/bias", "classifier/kernel")


def test_the_hub_is_asked_for_no_file_that_runs_code(folder, bert, monkeypatch):
    asked = {}

    def download(repo_id, **arguments):
        asked.update(arguments, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = mj.from_pretrained("org/bert.small")
    assert same(model, bert)
    assert (model.name_or_path, model.folder) == ("org/bert.small", str(folder))
    assert asked["repo_id"] == "org/bert.small"
    assert asked["ignore_patterns"] == ["*/*"]
    assert not {"*", "*.bin", "*.py", "pytorch_model.bin"} & set(asked["allow_patterns"])


def test_without_a_network_the_hub_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        r"'org/nothing' is not a folder here and could not be fetched .* `hf download org/nothing --local-dir FOLDER`"
    )
    with pytest.raises(FileNotFoundError, match=message) as error:
        mj.from_pretrained("org/nothing")
    assert "\n" not in str(error.value)


# saving


@pytest.mark.slow
def test_a_model_with_adapters_is_refused_and_a_merged_one_saved(folder, tmp_path):
    model = mj.from_pretrained(folder)
    mj.adapt(model, mj.MELoRAConfig(n=3, r=1, targets=["query"]), rngs=nnx.Rngs(0))
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"no place in the Hugging Face layout .*mj.merge\(model\).*mj.save_adapter"):
        mj.save_pretrained(model, folder)
    assert content(tmp_path) == before
    mj.save_pretrained(mj.merge(model), tmp_path / "merged")
    assert same(mj.from_pretrained(tmp_path / "merged"), mj.from_pretrained(folder))


def test_models_that_do_not_fit_their_configuration_are_refused(tmp_path):
    model = random_model("bert")
    model.classifier.kernel = nnx.Param(jnp.ones((21, 3)))
    with pytest.raises(
        ValueError, match=re.escape("classifier/kernel has shape [21, 3], the model's config asks for [21, 2]")
    ):
        mj.save_pretrained(model, tmp_path / "saved")
    del model.bert.pooler
    with pytest.raises(ValueError, match="the model lacks bert/pooler/dense/bias, bert/pooler/dense/kernel, which"):
        mj.save_pretrained(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="Linear did not come from from_pretrained"):
        mj.save_pretrained(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_leaves_the_old_checkpoint(folder, bert, monkeypatch):
    before = content(folder)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("melora_jax.models.hub.save.write_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        mj.save_pretrained(bert, folder)
    assert content(folder.parent) == {f"bert/{name}": data for name, data in before.items()}


def test_tokenizer_files_go_along(folder, tmp_path, caplog):
    (folder / "vocab.txt").write_text("a")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("no tokenizer")
    model = mj.from_pretrained(folder)
    model_files = {"config.json", "model.safetensors"}
    mj.save_pretrained(model, tmp_path / "own")
    assert content(tmp_path / "own").keys() == model_files | {"vocab.txt", "tokenizer.json"}
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other holds no tokenizer"):
        mj.save_pretrained(model, tmp_path / "never", tokenizer_from=tmp_path / "other")
    assert not (tmp_path / "never").exists()
    (tmp_path / "other" / "merges.txt").write_text("b")
    mj.save_pretrained(model, tmp_path / "named", tokenizer_from=tmp_path / "other")
    assert content(tmp_path / "named").keys() == model_files | {"merges.txt"}
    folder.rename(tmp_path / "moved")
    mj.save_pretrained(model, tmp_path / "without")
    assert content(tmp_path / "without").keys() == model_files
    assert "bert is gone, so no tokenizer was saved; name one with tokenizer_from" in caplog.text


@pytest.mark.slow
def test_minilm_is_saved_with_its_tokenizer(minilm_folder, tmp_path):
    import transformers

    mj.save_pretrained(mj.from_pretrained(minilm_folder, num_labels=2), tmp_path / "saved")
    first, second = (transformers.AutoTokenizer.from_pretrained(path) for path in (minilm_folder, tmp_path / "saved"))
    text = "an unusually good film, wasn't it?"
    assert second(text)["input_ids"] == first(text)["input_ids"]
