"""Adapters from PEFT and from the authors: what comes in computes what it did there, ours bit for bit."""

from __future__ import annotations

import json
import logging
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import melora_jax as mj
from melora_jax.adapters.adapt import adapters_of, config_of
from tests.library.checkpoints import authors
from tests.support import models_fixtures as fixtures
from tests.support import tiny

CONFIG, TENSORS, OWN = "adapter_config.json", "adapter_model.safetensors", "melora_config.json"


def without_padding(model: Any) -> Any:
    """The model with zeros where a mini is narrower than the widest, as they are unless someone sets them."""
    for layer in adapters_of(model).values():
        used = layer.scale != 0
        layer.a[...] = jnp.where(used[:, None, :], layer.a[...], 0.0)
        layer.b[...] = jnp.where(used[:, :, None], layer.b[...], 0.0)
    return model


OURS: dict[str, dict[str, Any]] = {
    "one scale": {"r": 2},
    "mixed ranks and alphas": {"r": [1, 3], "alpha": [4, 10]},
    "overrides": {"n_pattern": {"0.query": 1}, "rank_pattern": {"1.value": [2, 1]}, "alpha_pattern": {"value": 3}},
    "shuffle, total, alphas": {"mixer": "shuffle", "r": 4, "scaling": "total", "alpha": [3, 5]},
    "all, rslora": {"mixer": "all", "r": 3, "scaling": "rslora", "targets": "all-linear", "alpha": [3, 7]},
    "an embedding": {"targets": ["embed", "out"], "n_pattern": {"embed": 1}, "dropout": 0.1},
    "no head": {"modules_to_save": [], "init": "gaussian", "strategy": "batched", "layers": [1]},
}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["lora", "bdlora"])
@pytest.mark.parametrize("name", OURS)
def test_what_was_exported_comes_back_bit_for_bit(name: str, format: Any, tmp_path: Path) -> None:
    model = without_padding(tiny.trained(**OURS[name]))
    if format == "bdlora" and name in ("overrides", "all, rslora", "an embedding"):
        with pytest.raises(ValueError, match=r'format="bdlora" .*; choose format="lora"'):
            mj.export_peft(model, tmp_path / "peft", format)
        return
    loaded = tiny.Encoder()
    assert mj.import_peft(loaded, mj.export_peft(model, tmp_path / "peft", format)) == mj.describe(model)
    tiny.assert_equal(tiny.arrays(loaded), tiny.arrays(model))
    assert nnx.graphdef(loaded) == nnx.graphdef(model)


BLOCKS: dict[str, dict[str, Any]] = {
    "one scale": {"r": 2, "targets": ["query"]},
    "mixed ranks": {"r": [1, 3], "alpha": [4, 12]},
    "unlike sites": {"rank_pattern": {"1.value": [2, 1]}, "n_pattern": {"0.query": 1}},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block_diagonal_lora_without_our_file_is_recognised(name: str, tmp_path: Path) -> None:
    model = without_padding(tiny.trained(**BLOCKS[name]))
    folder = mj.export_peft(model, tmp_path / "peft")
    (folder / OWN).unlink()
    loaded = tiny.Encoder()
    found = mj.import_peft(loaded, folder)
    assert [(site.path, site.n, site.r) for site in found.sites] == [
        (site.path, site.n, site.r) for site in mj.describe(model).sites
    ]
    np.testing.assert_allclose(tiny.run(loaded, tiny.IDS), tiny.run(model, tiny.IDS), rtol=1e-6, atol=1e-6)


def test_what_was_changed_since_is_read_as_the_lora_that_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mj.export_peft(tiny.trained(r=2), tmp_path / "peft")
    tensors = load_file(folder / TENSORS)
    key = "base_model.model.layer.0.query.lora_A.weight"
    tensors[key] = tensors[key] + np.float32(0.5)
    save_file(tensors, folder / TENSORS)
    loaded = tiny.Encoder()
    with caplog.at_level(logging.WARNING, "melora_jax"):
        found = mj.import_peft(loaded, folder)
    assert "is not what melora_config.json beside it describes: it was changed since; read as LoRA" in caplog.text
    assert {site.path: site.n for site in found.sites}["layer/0/query"] == 1
    layer: Any = loaded.layer[0].query
    lora_b = tensors[key.replace("_A", "_B")]
    np.testing.assert_allclose(layer.delta(), 8 * (lora_b @ tensors[key]).T, rtol=1e-5, atol=1e-6)


ROUNDINGS = {
    "not base64": (
        "!",
        r"melora_config.json: a rounding can't be read \(.*\) at layer/0/query; export the adapter again",
    ),
    "of another size": (
        "eJwDAAAAAAE=",
        r"melora_config.json: a rounding is not of 30 numbers at layer/0/query; export",
    ),
    "no text": (3, r"melora_config.json has roundings that are not text by site; export the adapter again"),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_roundings_that_are_damaged_are_refused(name: str, tmp_path: Path) -> None:
    value, message = ROUNDINGS[name]
    folder = mj.export_peft(tiny.trained(r=[3, 3], alpha=[3, 5]), tmp_path / "peft")
    facts = json.loads((folder / OWN).read_text())
    facts["roundings"]["layer/0/query"] = value
    (folder / OWN).write_text(json.dumps(facts))
    model = tiny.Encoder()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=message):
        mj.import_peft(model, folder)
    tiny.assert_as_before(model, before)


# PEFT's own adapters

PEFT: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"]},
    "rsLoRA": {"r": 5, "lora_alpha": 4, "use_rslora": True, "target_modules": ["query", "key"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": "roberta.*(query|dense)",
        "exclude_modules": "classifier.*",
        "rank_pattern": {"layer.1.attention.self.query": 4},
        "alpha_pattern": {".*intermediate.dense": 9, "query": 2},
    },
    "an embedding": {"r": 3, "lora_alpha": 6, "target_modules": ["word_embeddings", "query"]},
}


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", PEFT)
def test_lora_from_peft_gives_its_logits(name: str, tmp_path: Path) -> None:
    import peft
    import torch

    base = fixtures.torch_model("roberta", "sequence-classification", 3)
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(task_type="SEQ_CLS", **PEFT[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, settings).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    model = mj.from_pretrained(tmp_path / "base", num_labels=3)
    found = mj.import_peft(model, tmp_path / "peft")
    assert {site.n for site in found.sites} == {1}
    assert found.saved == ("classifier",)
    inputs = fixtures.batch("roberta")
    ours = np.asarray(nnx.jit(lambda model: model(**inputs))(model))
    np.testing.assert_allclose(ours, fixtures.torch_output(theirs, inputs), rtol=0, atol=1e-5)


def write_lora(folder: Path, *sites: str, r: int = 3, **settings: Any) -> dict[str, np.ndarray]:
    """A LoRA for tiny.Encoder as PEFT writes it; its tensors."""
    rng = np.random.default_rng(5)
    tensors = {}
    for site in sites or ("layer.0.query", "layer.1.query"):
        tensors[f"base_model.model.{site}.lora_A.weight"] = rng.normal(size=(r, tiny.WIDTH)).astype(np.float32)
        tensors[f"base_model.model.{site}.lora_B.weight"] = rng.normal(size=(tiny.INNER, r)).astype(np.float32)
    folder.mkdir()
    values = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": ["query"], "task_type": None} | settings
    (folder / CONFIG).write_text(json.dumps(values))
    save_file(tensors, folder / TENSORS)
    return tensors


def test_the_config_reads_like_the_one_it_came_from(tmp_path: Path) -> None:
    write_lora(tmp_path / "peft", lora_dropout=0.1, use_rslora=True)
    model = tiny.Encoder()
    mj.import_peft(model, tmp_path / "peft")
    expected = mj.MELoRAConfig(n=1, r=3, alpha=6, dropout=0.1, scaling="rslora", targets=["query"])
    assert config_of(model) == expected


def test_a_selection_that_names_do_not_make_is_listed_by_path(tmp_path: Path) -> None:
    write_lora(tmp_path / "peft", "layer.0.query", "layer.1.value")
    model = tiny.Encoder()
    found = mj.import_peft(model, tmp_path / "peft")
    assert [site.path for site in found.sites] == ["layer/0/query", "layer/1/value"]
    folder = mj.save_adapter(model, tmp_path / "own")
    again = tiny.Encoder()
    mj.load_adapter(again, folder)
    tiny.assert_equal(tiny.arrays(again), tiny.arrays(model))


def test_a_copy_of_the_base_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # PEFT puts it beside an adapted embedding
    tensors = write_lora(tmp_path / "peft")
    tensors["base_model.model.embed.base_layer.weight"] = np.ones((tiny.VOCAB, tiny.WIDTH), np.float32)
    save_file(tensors, tmp_path / "peft" / TENSORS)
    with caplog.at_level(logging.WARNING, "melora_jax"):
        found = mj.import_peft(tiny.Encoder(), tmp_path / "peft")
    assert "holds the base's own embed.base_layer.weight, which is left out: the model's is used" in caplog.text
    assert len(found.sites) == 2


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    tensors = write_lora(tmp_path / "peft")
    half = {key: value.astype(jnp.bfloat16) for key, value in tensors.items()}
    save_file(half, tmp_path / "peft" / TENSORS)
    model = tiny.Encoder()
    mj.import_peft(model, tmp_path / "peft")
    layer: Any = model.layer[0].query
    expected = half["base_model.model.layer.0.query.lora_A.weight"].astype(np.float32).T
    np.testing.assert_array_equal(layer.a[0], expected)


# the authors' own

R, ALPHA = [1, 2, 3], [4, 8, 16]


class Three(nnx.Module):
    """A host whose layers three minis divide."""

    def __init__(self) -> None:
        self.query: Any = nnx.Linear(6, 15, rngs=nnx.Rngs(0))
        self.value: Any = nnx.Linear(6, 15, rngs=nnx.Rngs(1))
        self.classifier: Any = nnx.Linear(15, 2, rngs=nnx.Rngs(2))

    def __call__(self, x: Any) -> Any:
        return self.classifier(self.query(x) * self.value(x))


def theirs() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Minis by module, and the whole state dict with a classifier."""
    sites = {name: authors.minis(seed, 6, 15, R) for seed, name in enumerate(("query", "value"))}
    head = {"classifier.weight": np.full((2, 15), 0.25, np.float32), "classifier.bias": np.ones(2, np.float32)}
    return sites, authors.tensors(sites) | {f"base_model.model.{name}": value for name, value in head.items()}


def check_forward(model: Three, sites: dict[str, Any]) -> None:
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    for name, pairs in sites.items():
        layer = getattr(model, name)
        expected = np.asarray(layer.base(x), np.float64) + authors.forward(x, pairs, ALPHA)
        np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-6 * abs(expected).max())
    np.testing.assert_array_equal(model.classifier.kernel[...], np.full((15, 2), 0.25))


def test_the_authors_files_give_their_forward(tmp_path: Path) -> None:
    sites, tensors = theirs()
    authors.write_config(tmp_path, R, ALPHA)
    save_file(tensors, tmp_path / TENSORS)
    model = Three()
    found = mj.import_peft(model, tmp_path)
    assert [(site.path, site.n, site.r, site.rank) for site in found.sites] == [
        ("query", 3, (1, 2, 3), 6),
        ("value", 3, (1, 2, 3), 6),
    ]
    check_forward(model, sites)


@pytest.mark.parity
def test_the_authors_pickled_files_give_their_forward_too(tmp_path: Path) -> None:
    import torch

    sites, tensors = theirs()
    authors.write_config(tmp_path, R, ALPHA)
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, tmp_path / "adapter_model.bin")
    model = Three()
    mj.import_peft(model, tmp_path)
    check_forward(model, sites)


# refusals


def changed(**changes: Any) -> Any:
    def change(folder: Path, _: dict[str, np.ndarray]) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | changes))

    return change


def tensor(key: str, value: np.ndarray | None) -> Any:
    def change(folder: Path, tensors: dict[str, np.ndarray]) -> None:
        whole = {**tensors, f"base_model.model.{key}": value}
        save_file({name: array for name, array in whole.items() if array is not None}, folder / TENSORS)

    return change


QUERY = "layer.0.query"
ONES = np.ones((3, tiny.WIDTH), np.float32)
BAD: dict[str, tuple[Any, str]] = {
    "another method": (changed(peft_type="IA3"), "is of peft_type 'IA3'; LORA and the authors' MELORA are read"),
    "DoRA without its norms": (
        changed(use_dora=True),
        "has no lora_magnitude_vector of layer/0/query, and adapter_config.json says use_dora=True; save the",
    ),
    "norms without DoRA": (
        tensor("layer.0.query.lora_magnitude_vector", np.ones(10, np.float32)),
        "has a lora_magnitude_vector of layer/0/query, and adapter_config.json says use_dora=False; save",
    ),
    "norms of no layer": (
        tensor("layer.7.query.lora_magnitude_vector", np.ones(10, np.float32)),
        "holds norms of layer/7/query, and no lora_A and lora_B beside them; save the adapter again",
    ),
    "biases": (changed(bias="some"), "has bias='some'; PEFT knows none, all, lora_only"),
    "PiSSA": (changed(init_lora_weights="pissa"), "has init_lora_weights='pissa', which changed the base; save it in"),
    "an unknown key": (changed(rank_patern={"q": 2}), "(perhaps 'rank_pattern' is meant); merge it in PEFT"),
    "a rank of 0": (changed(r=0), f"{CONFIG}: r=0 must be a whole number of at least 1"),
    "another rank": (changed(r=4), f"{TENSORS}: lora_A of layer/0/query has rank 3, adapter_config.json says 4"),
    "lists": (changed(peft_type="MELORA"), "r=3 and lora_alpha=6 must be lists with one value for each mini"),
    "a mini too few": (
        changed(peft_type="MELORA", r=[1, 2], lora_alpha=[1, 2]),
        f"{TENSORS} lacks a mini's factor of layer/0/query, or has one too many, for the 2 of the config",
    ),
    "no B": (tensor(f"{QUERY}.lora_B.weight", None), "has lora_A of layer/0/query where one lora_A and one lora_B are"),
    "no rank in common": (
        tensor(f"{QUERY}.lora_A.weight", ONES[:2]),
        f"{TENSORS}: lora_A and lora_B of layer/0/query have shapes [2, 6] and [10, 3], which share no rank",
    ),
    "twice": (tensor(f"{QUERY}.lora_A.default.weight", ONES), f"{TENSORS} holds lora_A of layer/0/query twice; remove"),
    "a vector": (tensor(f"{QUERY}.lora_A.weight", ONES[0]), "has shape [6]; a factor is a matrix"),
    "another width": (
        tensor(f"{QUERY}.lora_A.weight", np.ones((3, 7), np.float32)),
        "is for another model: layer/0/query/a is [1, 7, 3] there and [1, 6, 3] in this model; load the base",
    ),
    "another layer": (
        tensor("layer.7.query.lora_A.weight", ONES),
        "has lora_A of layer/7/query where one lora_A and one lora_B are expected",
    ),
    "a head that nobody named": (
        tensor("classifier.bias", np.ones(3, np.float32)),
        f"{TENSORS}: classifier.bias is neither a LoRA factor nor in modules_to_save; it has no place here",
    ),
    "a head that is missing": (
        changed(modules_to_save=["pooler"]),
        f"{TENSORS} lacks pooler, which modules_to_save in adapter_config.json names",
    ),
    "not a number": (tensor(f"{QUERY}.lora_A.weight", ONES * np.nan), "has values that are not finite: training div"),
    "whole numbers": (tensor(f"{QUERY}.lora_A.weight", ONES.astype(np.int32)), "is int32; convert it to float32,"),
    "no tensors": (
        lambda folder, _: (folder / TENSORS).unlink(),
        "is not a PEFT adapter: it has neither adapter_model.",
    ),
    "no config": (lambda folder, _: (folder / CONFIG).unlink(), "adapter_config.json does not exist; check the folde"),
    "10 MB of junk": (
        lambda folder, _: (folder / TENSORS).write_bytes(np.random.default_rng(0).bytes(10_000_000)),
        "is truncated or is not a safetensors file",
    ),
    "a key twice": (
        lambda folder, _: (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 3, "r": 4}'),
        "names 'r' twice",
    ),
}


def header_that_lies(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """A shape that asks for more bytes than the tensor has."""
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data.replace(b"[3,6]", b"[9,6]"))


def pickle_that_runs_code(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    (folder / TENSORS).unlink()
    with zipfile.ZipFile(folder / "adapter_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")


BAD["a pickle that runs code"] = (pickle_that_runs_code, "asks for posix.system, which builds no tensor; do not trust")
BAD["a header that lies"] = (header_that_lies, "is truncated or is not a safetensors file")


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line_and_the_model_is_as_it_was(name: str, tmp_path: Path) -> None:
    damage, message = BAD[name]
    folder = tmp_path / "peft"
    damage(folder, write_lora(folder))
    model = tiny.Encoder()
    before = tiny.snapshot(model)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        mj.import_peft(model, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    tiny.assert_as_before(model, before)


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    write_lora(tmp_path / "peft", "encoder.layer.0.query")
    model = tiny.Encoder()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=r"does not fit this model: targets: 'encoder/layer/0/query' matches no modu"):
        mj.import_peft(model, tmp_path / "peft")
    tiny.assert_as_before(model, before)
