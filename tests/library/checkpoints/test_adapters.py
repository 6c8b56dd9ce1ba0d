"""Adapters to folders and back, bit for bit; what can not be written leaves what was there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from tests.support import disk, tiny

CONFIG, TENSORS = "melora_config.json", "melora_adapter.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mj.save_adapter(tiny.trained(r=[1, 2]), tmp_path / "adapter")


CASES: dict[str, dict[str, Any]] = {
    "mixed ranks and alphas": {"r": [1, 3], "alpha": [4, 10]},
    "overrides": {"n_pattern": {"0.query": 1}, "rank_pattern": {"1.value": [2, 1]}, "alpha_pattern": {"value": 3}},
    "shuffle, total": {"mixer": "shuffle", "r": 4, "scaling": "total"},
    "all, rslora": {"mixer": "all", "r": 3, "scaling": "rslora", "targets": "all-linear"},
    "an embedding": {"targets": ["embed", "out"], "n_pattern": {"embed": 1}, "dropout": 0.1},
    "a head alone": {"targets": ()},
    "no head": {"modules_to_save": [], "init": "gaussian", "strategy": "batched", "layers": [1]},
}


@pytest.mark.parametrize("name", CASES)
def test_loading_gives_what_was_saved_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny.trained(**CASES[name])
    folder = mj.save_adapter(model, tmp_path / "adapter")
    fresh, other = tiny.Encoder(), tiny.Encoder()
    mj.adapt(other, tiny.config(**CASES[name]), rngs=nnx.Rngs(9))
    for loaded in (fresh, other):
        assert mj.load_adapter(loaded, folder) == mj.describe(model)
        tiny.assert_equal(tiny.arrays(loaded, nnx.Param), tiny.arrays(model, nnx.Param))
        tiny.assert_equal(tiny.arrays(loaded), tiny.arrays(model))
        assert nnx.graphdef(loaded) == nnx.graphdef(model)
    mj.save_adapter(fresh, tmp_path / "again")
    assert disk.content(tmp_path / "again") == disk.content(folder)


def test_the_files_hold_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    model = tiny.trained(r=[1, 2])
    tiny.assert_equal(load_file(mj.save_adapter(model, tmp_path / "adapter") / TENSORS), tiny.arrays(model, nnx.Param))
    facts = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert mj.MELoRAConfig.from_json(json.dumps(facts["config"])) == tiny.config(r=[1, 2])
    assert facts["sites"]["layer/0/query"] == {
        "n": 2,
        "r": [1, 2],
        "alpha": [16.0, 16.0],
        "dropout": 0.0,
        "scaling": "mini",
        "mixer": "identity",
        "strategy": "auto",
        "init": "kaiming",
        "dtype": None,
        "variant": "plain",
        "lookup": False,
    }
    assert (facts["format"], facts["version"], facts["base_model"], facts["task"]) == ("melora_jax", 1, None, None)


def test_a_bfloat16_base_is_left_as_it_is_and_the_head_comes_back_in_float32(tmp_path: Path) -> None:
    model = tiny.trained(dtype=jnp.bfloat16)
    folder = mj.save_adapter(model, tmp_path / "adapter")
    loaded = tiny.Encoder(dtype=jnp.bfloat16)
    mj.load_adapter(loaded, folder)
    tiny.assert_equal(tiny.arrays(loaded), tiny.arrays(model))


@pytest.mark.parametrize("use", [lambda model: mj.save_adapter(model, "nowhere"), mj.merge, mj.unwrap])
def test_a_model_whose_arrays_a_step_has_taken_is_told_so(use: Any) -> None:
    model = tiny.trained()
    model.layer[0].query.a.get_raw_value().delete()
    expected = (
        "the array of layer/0/query/a is gone: a training step has taken it over; call nnx.update(model, "
        "state.trainable, state.host) with the step's newest state first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        use(model)


def test_a_model_whose_arrays_are_gone_can_be_loaded_into(folder: Path) -> None:
    model = tiny.trained(r=[1, 2], seed=0)
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        leaf.delete()
    mj.load_adapter(model, folder)
    tiny.assert_equal(tiny.arrays(model), tiny.arrays(tiny.trained(r=[1, 2])))


class Tied(nnx.Module):
    """A head whose kernel another module shares."""

    def __init__(self) -> None:
        self.body: Any = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.head: Any = nnx.Linear(6, 6, rngs=nnx.Rngs(1))
        self.first_head: Any = nnx.Linear(6, 6, rngs=nnx.Rngs(2))
        self.head.kernel = self.first_head.kernel


def test_tied_heads_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    model, loaded = Tied(), Tied()
    config = mj.MELoRAConfig(n=2, targets=["body"], modules_to_save=["head", "first_head"])
    mj.adapt(model, config, rngs=nnx.Rngs(0))
    model.head.kernel[...] += 1.0
    mj.load_adapter(loaded, mj.save_adapter(model, tmp_path / "adapter"))
    assert loaded.head.kernel is loaded.first_head.kernel
    tiny.assert_equal(tiny.arrays(loaded), tiny.arrays(model))


def test_saving_replaces_an_earlier_adapter(folder: Path) -> None:
    model = tiny.trained(n=1, r=3)
    assert mj.save_adapter(model, str(folder)) == folder
    loaded = tiny.Encoder()
    mj.load_adapter(loaded, folder)
    tiny.assert_equal(tiny.arrays(loaded), tiny.arrays(model))


@pytest.mark.parametrize("write", [mj.save_adapter, mj.export_peft])
def test_what_can_not_be_written_leaves_the_folder_as_it_was(write: Any, folder: Path) -> None:
    files = disk.content(folder.parent)
    with pytest.raises(ValueError, match=r"^Encoder was not adapted; call melora_jax.adapt"):
        write(tiny.Encoder(), folder)
    with pytest.raises(ValueError, match=r"melora_config.json is a file where a folder is to be written"):
        write(tiny.trained(), folder / CONFIG)
    with disk.no_file_larger_than(100), pytest.raises(OSError, match=r"cannot write .*: .*; free some space"):
        write(tiny.trained(), folder)
    assert disk.content(folder.parent) == files
    (folder / "notes.txt").write_text("mine")
    files = disk.content(folder.parent)
    with pytest.raises(ValueError, match=r"holds files that would be lost \(.*notes.txt.*\); choose an empty folder"):
        write(tiny.trained(), folder)
    assert disk.content(folder.parent) == files
