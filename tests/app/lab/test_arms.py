"""Arms of a comparison: words that say a method and what is particular about it."""

from __future__ import annotations

import re

import pytest

from train.config.run_config import RunConfig
from train.config.schema import DataConfig, ModelConfig, OutputConfig
from train.lab.tables.arms import arm_from_word, arms_from_words


def base() -> RunConfig:
    return RunConfig(ModelConfig("bert"), data=DataConfig(name="glue/cola"), output=OutputConfig("runs/cola"))


def test_a_word_says_a_method_and_its_settings() -> None:
    config = arm_from_word("melora:n=4,r=3,optim.learning_rate=1e-3,scaling=rslora").configured(base())
    assert (
        config.adapter.method,
        config.method.settings.n,
        config.method.settings.r,
        config.method.settings.scaling,
    ) == (
        "melora",
        4,
        3,
        "rslora",
    )
    assert (config.optim.learning_rate, config.model.name) == (1e-3, "bert")


@pytest.mark.parametrize(
    ("word", "folder"),
    [
        ("lora", "lora"),
        ("melora:n=8,r=2", "melora-n8-r2"),
        ("lora+:optim.learning_rate=1e-3", "lora+-optim-learning-rate1e-3"),
    ],
)
def test_its_folder_is_a_plain_name(word: str, folder: str) -> None:
    assert arm_from_word(word).folder == folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no method to run"),
        (["lorra"], "lorra: adapter.method = 'lorra' must be one of "),
        (["lora:"], "lora:: '' is not KEY=VALUE"),
        (["melora:n=8,r"], "melora:n=8,r: 'r' is not KEY=VALUE"),
        (["melora:n=8,n=4"], "adapter.n is given twice"),
        (["melora:rank=2"], "unknown key adapter.rank"),
        (["melora:n=two"], "melora:n=two: adapter.n = 'two' must be a whole number"),
        (["melora:optim.learning_rat=2"], "unknown key optim.learning_rat; perhaps optim.learning_rate"),
        (["melora:n=2,r=1", "melora:r=1,n=2"], "melora:n=2,r=1 and melora:r=1,n=2 are the same method"),
    ],
)
def test_a_bad_word_is_told(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        arms_from_words(words)


def test_settings_that_do_not_fit_name_the_arm() -> None:
    with pytest.raises(ValueError, match="melora:n=0: "):
        arm_from_word("melora:n=0").configured(base())
