"""What is said of a run from shapes alone is what its training meets."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

import melora_jax as mj
from tests.support.tiny_run import make_decoder, make_instructions, make_material, recipe
from train.config.run_config import RunConfig, from_toml
from train.lab.memory.planning import abstract_run
from train.loop.cohort import lone_run
from train.loop.setup import prepare


def classification(folder: Path) -> RunConfig:
    return from_toml(recipe(make_material(folder)))


def adalora_with_rates(folder: Path) -> RunConfig:
    words = "--adapter.method adalora --adapter.n 1 --adapter.r 4 --optim.head_learning_rate 1e-3 --train.max_steps 14"
    return from_toml(recipe(make_material(folder)), words.split())


def quantised_regression(folder: Path) -> RunConfig:
    make_material(folder)
    for name in ("train.jsonl", "held_out.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(r'"label": (\d)', r'"label": \1.5', text))
    return from_toml(recipe(folder), ["--model.task", "regression", "--model.quantize", "int8"])


def packed_text(folder: Path, pack: str = "pack") -> RunConfig:
    make_decoder(folder / "model")
    make_instructions(folder / "train.jsonl", 40)
    make_instructions(folder / "held_out.jsonl", 9, first=50)
    words = f"--model.task causal-lm --instruction.{pack} --adapter.targets q_proj --adapter.modules_to_save"
    return from_toml(recipe(folder), words.split())


def text_in_rows(folder: Path) -> RunConfig:
    return packed_text(folder, "no_pack")


@pytest.mark.parametrize("make", [classification, adalora_with_rates, quantised_regression, packed_text, text_in_rows])
def test_a_described_run_is_the_run(tmp_path, make):
    config = make(tmp_path)
    experiment = prepare(config)
    material, sizes = experiment.material, config.train
    for rows, split, batch in (
        (sizes.batch_size, material.train, material.plan.batch(0)),
        (sizes.eval_batch_size, material.validation, material.held_out[0]),
    ):
        assert shapes(split.batch(batch)) == shapes(experiment.run.batch(rows, batch.width))
    state, frozen, _, _ = abstract_run(config, sizes.batch_size).arguments
    cohort = lone_run(experiment)
    assert shapes(cohort.frozen) == shapes(frozen)
    assert shapes(cohort.state.trainable) == shapes(state.trainable)
    assert shapes(cohort.state.opt_state) == shapes(state.opt_state)
    assert str(experiment.run.adaptation) == str(mj.describe(experiment.model))


def shapes(tree):
    """Shapes and dtypes by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}
