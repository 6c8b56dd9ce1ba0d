"""Saved checkpoints lie as the one they came from: files, index, dtypes; and transformers gives our logits."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import melora_jax as mj
from tests.support import models_fixtures as fixtures
from tests.support import tiny
from tests.support.decoder_fixtures import CONFIGS, apply, random_decoder, token_ids, torch_decoder, torch_run

pytestmark = pytest.mark.slow

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, name: str, dtype: Any = np.float32) -> dict[str, str]:
    """A checkpoint in two files that do not follow the order of the names, norms in float32; its weight map."""
    tensors = fixtures.tensors_of(random_decoder(name))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | {"torch_dtype": np.dtype(dtype).name}))
    files = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(sorted(tensors))}
    for file in set(files.values()):
        held = {key: value for key, value in tensors.items() if files[key] == file}
        cast = {key: value if "norm" in key else value.astype(dtype) for key, value in held.items()}
        save_file({key: np.ascontiguousarray(value) for key, value in cast.items()}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def merged(folder: Path, **settings: Any) -> Any:
    model = mj.from_pretrained(folder, task="causal-lm")
    config = {"n": 2, "r": [1, 3], "targets": ["q_proj", "down_proj"]} | settings
    mj.adapt(model, mj.MELoRAConfig(**config), rngs=nnx.Rngs(0))
    return mj.merge(tiny.stirred(model))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_merged_model_keeps_files_index_and_tie(name: str, tmp_path: Path) -> None:
    files = sharded(tmp_path / "base", name)
    model = merged(tmp_path / "base")
    mj.save_pretrained(model, tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert index["weight_map"] == files
    assert ("lm_head.weight" in files) == (name == "llama")
    held: dict[str, np.ndarray] = {}
    for file in set(files.values()):
        tensors = load_file(tmp_path / "saved" / file)
        assert tensors.keys() == {key for key, where in files.items() if where == file}
        held |= tensors
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in held.values())
    again = mj.from_pretrained(tmp_path / "saved", task="causal-lm")
    tiny.assert_equal(tiny.arrays(again), tiny.arrays(model))


def test_each_tensor_has_the_dtype_that_it_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = sharded(tmp_path / "base", "llama", jnp.bfloat16)
    model = merged(tmp_path / "base", modules_to_save=["lm_head"])
    with caplog.at_level(logging.INFO, "melora_jax"):
        mj.save_pretrained(model, tmp_path / "saved")
    assert "16 tensors are saved as bfloat16, as in " in caplog.text
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for file in set(files.values()):
        for key, value in load_file(tmp_path / "saved" / file).items():
            assert value.dtype == (np.float32 if "norm" in key else jnp.bfloat16), key
    again = mj.from_pretrained(tmp_path / "saved", task="causal-lm")
    for path, value in tiny.arrays(model).items():
        rounded = value if "norm" in path else value.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(tiny.arrays(again)[path], rounded)
    mj.save_pretrained(model, tmp_path / "wide", dtype="float32")
    wide = mj.from_pretrained(tmp_path / "wide", task="causal-lm")
    tiny.assert_equal(tiny.arrays(wide), tiny.arrays(model))


def test_a_narrow_model_is_not_widened(tmp_path: Path) -> None:
    sharded(tmp_path / "base", "llama")
    mj.save_pretrained(mj.from_pretrained(tmp_path / "base", task="causal-lm", dtype="bfloat16"), tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model-00001-of-00002.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(jnp.bfloat16)}


def test_a_new_head_goes_into_the_last_file(tmp_path: Path) -> None:
    body = fixtures.tensors_of(fixtures.random_model("bert", task="encoder"))
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fixtures.CONFIGS["bert"]))
    files = {key: f"model-0000{1 + ('layer.1' in key)}-of-00002.safetensors" for key in body}
    for file in set(files.values()):
        part = {key: np.ascontiguousarray(value) for key, value in body.items() if files[key] == file}
        save_file(part, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    mj.save_pretrained(mj.from_pretrained(folder, num_labels=3), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"]
    assert saved == {f"bert.{key}": file for key, file in files.items()} | dict.fromkeys(
        ("classifier.weight", "classifier.bias"), "model-00002-of-00002.safetensors"
    )


def test_what_a_dtype_can_not_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    sharded(tmp_path / "base", "llama", np.float16)
    model: Any = merged(tmp_path / "base")
    with pytest.raises(ValueError, match=r"^dtype 'int8' is unknown; choose from float32, bfloat16, float16, or leave"):
        mj.save_pretrained(model, tmp_path / "saved", dtype="int8")
    model.lm_head.kernel[...] += 1e5
    with pytest.raises(ValueError, match=r'lm_head/kernel has values too large for float16.*save with dtype="float32"'):
        mj.save_pretrained(model, tmp_path / "saved")
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "settings"), [("smollm2", {"targets": ["embed_tokens", "q_proj"], "n": 1, "r": 2})])
def test_transformers_reads_the_files_and_gives_our_logits(name: str, settings: Any, tmp_path: Path) -> None:
    sharded(tmp_path / "base", name)
    model = merged(tmp_path / "base", **settings)
    mj.save_pretrained(model, tmp_path / "saved")
    theirs, info = torch_decoder(tmp_path / "saved")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    ids = token_ids()
    expected = torch_run(theirs, ids)
    np.testing.assert_allclose(apply(model, ids), expected, rtol=0, atol=1e-6 * abs(expected).max())
