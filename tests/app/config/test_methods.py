"""The words of adapter.method: what each sets, what contradicts it, and what a recipe or a command line may say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import melora_jax as mj
from melora_jax.training import RankBudget
from train.config.methods import PRESETS, melora_config, resolve_method
from train.config.run_config import RunConfig, from_toml, to_toml
from train.config.schema import (
    AdaLoRAConfig,
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    Sections,
)

QV: dict[str, Any] = {"targets": ("query", "value"), "modules_to_save": ("classifier",)}
ALONE: dict[str, Any] = {"targets": (), "modules_to_save": ("classifier",)}


def run_config(adapter: AdapterConfig, adalora: AdaLoRAConfig | None = None) -> RunConfig:
    return RunConfig(
        ModelConfig("m"),
        adapter,
        adalora=adalora or AdaLoRAConfig(),
        data=DataConfig(name="glue/rte"),
        output=OutputConfig("runs/m"),
    )


def recipe(folder: Path, text: str, words: str = "") -> RunConfig:
    path = folder / "mine.toml"
    path.write_text('[model]\nname = "m"\n[data]\nname = "glue/rte"\n' + text)
    return from_toml(path, words.split())


def test_each_word_is_these_settings() -> None:
    expected = {
        "melora": mj.MELoRAConfig(**QV),
        "lora": mj.MELoRAConfig(n=1, r=8, **QV),
        "rslora": mj.MELoRAConfig(n=1, r=8, scaling="rslora", **QV),
        "lora+": mj.MELoRAConfig(n=1, r=8, **QV),
        "dora": mj.MELoRAConfig(n=1, r=8, variant="dora", **QV),
        "adalora": mj.MELoRAConfig(n=1, r=8, variant="adalora", **QV),
        "gralora": mj.MELoRAConfig(n=2, r=8, mixer="shuffle", **QV),
        "bitfit": mj.MELoRAConfig(bias="all", **ALONE),
        "head": mj.MELoRAConfig(**ALONE),
        "full": mj.MELoRAConfig(train_base=True, **ALONE),
    }
    assert PRESETS.keys() == expected.keys()
    assert {word: melora_config(AdapterConfig(method=word)) for word in PRESETS} == expected


def test_given_keys_are_taken() -> None:
    section = AdapterConfig(method="dora", n=4, r=(1, 2, 3, 4), alpha=2.0, targets="all-linear", modules_to_save=())
    config = melora_config(section)
    assert (config.n, config.r, config.alpha, config.variant) == (4, (1, 2, 3, 4), 2.0, "dora")
    assert (config.targets, config.modules_to_save) == ("all-linear", ())
    assert melora_config(AdapterConfig(method="lora", n=1, scaling="mini")).n == 1  # no contradiction
    assert melora_config(AdapterConfig(targets=())).targets == ()


def test_lora_plus_trains_b_at_16_times_the_rate_unless_told() -> None:
    optim, plus = OptimConfig(learning_rate=2e-4), AdapterConfig(method="lora+")
    assert resolve_method(Sections(optim=optim, adapter=plus)).optim == dataclasses.replace(
        optim, b_learning_rate=32e-4
    )
    told = dataclasses.replace(optim, b_learning_rate=1e-3)
    assert resolve_method(Sections(optim=told, adapter=plus)).optim == told
    assert resolve_method(Sections(optim=optim, adapter=AdapterConfig(method="lora"))).optim == optim


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"method": "lora", "n": 4},
            r"n=4 contradicts method='lora', which is n=1; leave it out, or take method=\"melo",
        ),
        (
            {"method": "rslora", "scaling": "mini"},
            r"scaling='mini' contradicts method='rslora', which is scaling='rslora'",
        ),
        ({"method": "gralora", "mixer": "all"}, r"mixer='all' contradicts method='gralora', which is mixer='shuffle'"),
        (
            {"method": "full", "targets": ("query",)},
            r"targets=\('query',\) contradicts method='full', which is targets=\(\)",
        ),
        ({"method": "head", "r": 8}, r"r=8 is of adapters, and method='head' has none; leave it out"),
        ({"method": "bitfit", "bias": "none"}, r"bias='none' contradicts method='bitfit', which is bias='all'"),
        ({"method": "dorra"}, r"method='dorra' is unknown; perhaps 'dora'"),
        ({"method": "adalora", "init": "pissa"}, r"init='pissa' is for variant=\"plain\", not 'adalora'"),
        ({"method": "gralora", "n": 3, "r": 8}, r"needs n to divide r: n=3, r=8; choose r from multiples of 3"),
    ],
)
def test_keys_that_contradict_the_word_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        melora_config(AdapterConfig(**section))
    with pytest.raises(ValueError, match=r"^\[adapter\] "):
        run_config(AdapterConfig(**section))


@pytest.mark.parametrize("word", PRESETS)
def test_a_word_in_a_recipe_on_the_command_line_and_back(tmp_path: Path, word: str) -> None:
    written = recipe(tmp_path, f'[adapter]\nmethod = "{word}"\n')
    given = recipe(tmp_path, "", f"--adapter.method {word}")
    assert written == given
    (tmp_path / "again.toml").write_text(to_toml(given))
    assert from_toml(tmp_path / "again.toml") == given


def test_a_recipe_with_a_wrong_word_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"mine.toml line 6: adapter.method = 'lorra' must be one of .*; perhaps 'lora'$"
    ):
        recipe(tmp_path, '[adapter]\nmethod = "lorra"\n')


def test_the_budget_of_adalora() -> None:
    assert run_config(AdapterConfig()).method.rank_budget(50) is None
    usual = run_config(AdapterConfig(method="adalora", r=5))
    assert usual.method.rank_budget(50) == RankBudget(target_r=3, total_step=50, tinit=5, tfinal=15, delta_t=10)
    assert usual.method.rank_budget(7) == RankBudget(target_r=3, total_step=7, tinit=0, tfinal=2, delta_t=5)
    # the authors' MELoRA baseline on GLUE
    authors = AdaLoRAConfig(target_r=8, tinit=1000, tfinal=2000, delta_t=10)
    budget = run_config(AdapterConfig(method="adalora", r=16), authors).method.rank_budget(9000)
    assert budget == RankBudget(target_r=8, total_step=9000, tinit=1000, tfinal=2000, delta_t=10)
    with pytest.raises(
        ValueError, match=r"^\[adalora\] tinit=1000 and tfinal=2000 leave no step of total_step=3000 in wh"
    ):
        run_config(AdapterConfig(method="adalora", r=16), authors).method.rank_budget(3000)


def test_adaloras_keys_belong_to_adalora() -> None:
    with pytest.raises(ValueError, match=r"^adalora.target_r=2 belongs to adapter.method=adalora, not lora; unset it$"):
        run_config(AdapterConfig(method="lora"), AdaLoRAConfig(target_r=2))
    with pytest.raises(ValueError, match=r"^adalora.orthogonality=-1 must be a finite number of at least 0$"):
        run_config(AdapterConfig(method="adalora"), AdaLoRAConfig(orthogonality=-1))


def test_alpha_varies_among_runs_of_one_step_where_it_is_one_factor_on_b() -> None:
    alike = [{}, {"method": "lora"}, {"method": "dora"}, {"init": "orthogonal", "r": 2}]
    own = [{"method": "adalora"}, {"init": "pissa"}, {"alpha": (1.0,) * 8}, {"alpha_pattern": {"query": 3.0}}]
    assert [run_config(AdapterConfig(**one)).method.varying_alpha() for one in alike + own] == [True] * 4 + [False] * 4
