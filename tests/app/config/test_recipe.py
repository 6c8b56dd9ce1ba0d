"""Recipes: the shipped ones say what the authors ran, and a bad one is told by file, line and nearest key."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from melora_jax import MELoRAConfig
from train.config.recipe import RECIPES, read_recipe
from train.config.run_config import from_toml
from train.config.schema import Sections


# PAPER: the released glue_finetune.sh and run_glue_lora.py; (epochs, batch, tokens, learning rate, metric).
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mnli", (30, 128, 256, 5e-4, "accuracy")),
        ("sst2", (60, 128, 256, 5e-4, "accuracy")),
        ("mrpc", (30, 128, 256, 4e-4, "accuracy")),
        ("cola", (8, 64, 256, 4e-4, "matthews")),
        ("cola-80", (80, 64, 256, 4e-4, "matthews")),
        ("qnli", (25, 128, 256, 4e-4, "accuracy")),
        ("qqp", (25, 128, 256, 4e-4, "accuracy")),
        ("rte", (80, 128, 512, 4e-4, "accuracy")),
        ("stsb", (40, 128, 256, 4e-4, "pearson")),
    ],
)
def test_glue_recipes_are_the_authors_settings(name, settings):
    config = from_toml(RECIPES / f"{name}.toml")
    train, data, optim = config.train, config.data, config.optim
    assert (train.epochs, train.batch_size, data.max_length, optim.learning_rate, config.metric) == settings
    assert optim.head_learning_rate == optim.learning_rate / 2
    assert config.output.folder == f"runs/{name}"
    assert config.method.settings == MELoRAConfig(
        n=2, r=8, alpha=16, dropout=0.05, targets=["query", "value"], modules_to_save=["classifier"]
    )
    assert (optim.weight_decay, optim.beta1, optim.beta2, optim.epsilon) == (0.01, 0.9, 0.999, 1e-8)
    assert (optim.warmup_ratio, optim.clip_norm, optim.schedule, train.seed) == (0.06, 1.0, "linear", 42)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_say_command_cost_and_score_and_nothing_by_default(path):
    config = from_toml(path)
    comment = path.read_text().partition("[")[0]
    assert f"Command: python -m train run train/recipes/{path.name}" in comment
    assert "Cost: " in comment
    assert "Expected: " in comment
    given = tomllib.loads(path.read_text())
    defaults = {field.name: vars(getattr(Sections(), field.name)) for field in dataclasses.fields(Sections)}
    same = [f"{s}.{k}" for s, table in given.items() for k in table if getattr(vars(config)[s], k) == defaults[s][k]]
    assert same == (["data.label"] if path.stem == "local" else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\n# why\nlearning_rat = 1\n", "line 3: unknown key optim.learning_rat; perhaps optim.learning_rate"),
        ("[train]\n\nlearning_rate = 1\n", "line 3: unknown key train.learning_rate; perhaps optim.learning_rate"),
        ("[adaptor]\nn = 2\n", "line 1: unknown section adaptor; perhaps [adapter]"),
        ("epochs = 2\n[train]\n", "line 1: key epochs stands outside any section; perhaps train.epochs"),
        ("[ train ]  # x\n 'wibble' = 2\n", "unknown key train.wibble; there are epochs, max_steps, "),
        ("optim.lerning_rate = 1\n", "line 1: unknown key optim.lerning_rate; perhaps optim.learning_rate"),
        ("[data]\n[[optim]]\n", ": key optim stands outside any section; perhaps [optim]"),
        ('[train]\nepochs = "3"\n', "line 2: train.epochs = '3' must be a whole number"),
        ("[train]\nepochs = 2.5\n", "line 2: train.epochs = 2.5 must be a whole number"),
        ("[train]\nepochs = true\n", "line 2: train.epochs = True must be a whole number"),
        ("[optim]\nlearning_rate = true\n", "line 2: optim.learning_rate = True must be a number"),
        ("[train]\ntensorboard = 1\n", "line 2: train.tensorboard = 1 must be true or false"),
        ('[data]\ntext = "sentence"\n', "line 2: data.text = 'sentence' must be a list, each entry a string"),
        ("[adapter]\nr = [1, 0.5]\n", "r = [1, 0.5] must be a whole number or a list, each entry a whole number"),
        ('[adapter]\nmixer = "al"\n', "mixer = 'al' must be one of 'identity', 'all', 'shuffle'"),
        ("[adapter.rank_pattern]\nq = 0.5\n", "line 1: adapter.rank_pattern = {'q': 0.5} must be a table, each value"),
        ("[train]\nepochs = = 2\n", "mine.toml is not TOML: Invalid value (at line 2, column 10)"),
        ("[wibble]\n", "line 1: unknown section wibble; there are model, adapter, data, instruction, optim, train"),
        ("[train]\nseed = 1\nseed = 2\n", "mine.toml is not TOML: Cannot overwrite a value (at line 3"),
    ],
)  # fmt: skip
def test_a_bad_recipe_names_file_line_and_remedy(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at nowhere\.toml; .*cola\.toml, local\.toml, mnli\.toml"):
        read_recipe(Path("nowhere.toml"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"model\.safetensors is not TOML"):
        read_recipe(path)
