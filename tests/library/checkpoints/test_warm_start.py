"""Factors that start from another task's adapter; its head stays behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from tests.support import tiny, tiny_run
from train.__main__ import main
from train.config.run_config import from_toml
from train.loop.setup import prepare


def test_the_factors_are_taken_and_the_head_is_not(tmp_path: Path) -> None:
    source = tiny.trained()
    folder = mj.save_adapter(source, tmp_path / "mnli")
    model = tiny.Encoder()
    mj.adapt(model, tiny.config(dropout=0.25), rngs=nnx.Rngs(9))  # dropout changes no function of the factors
    before = tiny.arrays(model)
    mj.warm_start(model, folder)
    after, wanted = tiny.arrays(model), tiny.arrays(source)
    for path, value in after.items():
        factor = path.rpartition("/")[2] in ("a", "b")
        np.testing.assert_array_equal(value, wanted[path] if factor else before[path], err_msg=path)
    assert any(np.any(before[path] != value) for path, value in after.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, "at layer/0/query their r is (1, 1), here it is (2, 2)"),
        ({"n": 1}, "at layer/0/query their n is 2, here it is 1"),
        ({"variant": "dora"}, "their variant is plain, here it is dora"),
        ({"init": "pissa"}, "their init is 'kaiming', here it is 'pissa', and PiSSA's are differences from its start"),
        ({"alpha": 3}, "their scales is (16.0, 16.0), here it is (3.0, 3.0)"),
        ({"targets": ["query"]}, "the adapter has layer/0/value and the model has not"),
        ({"targets": ["query", "value", "out"]}, "the model has layer/0/out and the adapter has not"),
    ],
)
def test_other_factors_are_refused_and_change_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = mj.save_adapter(tiny.trained(), tmp_path / "mnli")
    model = tiny.adapted(**changes)
    before = tiny.arrays(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        mj.warm_start(model, folder)
    tiny.assert_equal(tiny.arrays(model), before)


def test_another_width_is_told_as_such(tmp_path: Path) -> None:
    narrow, wide = (
        nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0))),
        nnx.Sequential(nnx.Linear(4, 10, rngs=nnx.Rngs(0))),
    )
    for model in (narrow, wide):
        mj.adapt(model, mj.MELoRAConfig(n=2, targets="all-linear"), rngs=nnx.Rngs(0))
    folder = mj.save_adapter(narrow, tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"another width: layers/0/b is \[2, 1, 3\] there and \[2, 1, 5\] here"):
        mj.warm_start(wide, folder)


@pytest.mark.slow
def test_a_run_starts_from_an_adapter(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tiny_run.make_material(tmp_path), train={"max_steps": 4})
    assert main(["run", str(recipe)]) == 0
    options = ["--train.warm_start", str(tmp_path / "run/adapter"), "--output.folder", str(tmp_path / "warm")]
    cold, warm = (tiny.arrays(prepare(from_toml(recipe, words)).model, mj.MELoRAParam) for words in ([], options))
    saved = load_file(tmp_path / "run/adapter/melora_adapter.safetensors")
    for path, factor in warm.items():
        np.testing.assert_array_equal(factor, saved[path])
        assert np.any(cold[path] != factor)
    assert main(["run", str(recipe), *options, "--adapter.r", "2"]) == 2
    assert not (tmp_path / "warm").exists()


@pytest.mark.parametrize("settings", [{"variant": "dora"}, {"init": "pissa"}])
def test_what_an_adapter_has_beside_its_factors_comes_along(tmp_path: Path, settings: dict[str, Any]) -> None:
    source, model = tiny.adapted(**settings), tiny.Encoder()
    mj.adapt(model, tiny.config(**settings), rngs=nnx.Rngs(9))
    mj.warm_start(model, mj.save_adapter(source, tmp_path / "mnli"))
    tiny.assert_equal(tiny.arrays(model, mj.MELoRAParam), tiny.arrays(source, mj.MELoRAParam))


def test_a_model_without_adapters_has_nothing_to_start(tmp_path: Path) -> None:
    folder = mj.save_adapter(tiny.trained(), tmp_path / "mnli")
    with pytest.raises(ValueError, match="adapt"):
        mj.warm_start(tiny.Encoder(), folder)
