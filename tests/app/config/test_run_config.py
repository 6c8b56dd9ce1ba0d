"""The run's configuration: overrides, the round trip through TOML, and bad values."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melora_jax import MELoRAConfig
from train.config.methods import melora_config
from train.config.run_config import RunConfig, from_toml, to_toml
from train.config.schema import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    Sections,
    TrainConfig,
)

MINIMAL = '[model]\nname = "m"\n[data]\nname = "glue/rte"\n'
SECTIONS = {field.name: typing.get_type_hints(Sections)[field.name] for field in dataclasses.fields(Sections)}


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_bytes(text.encode())
    return path


def load(folder: Path, words: str = "", text: str = MINIMAL) -> RunConfig:
    return from_toml(write(folder, text), words.split())


def error_of(folder: Path, words: str = "", text: str = MINIMAL) -> str:
    """The message of a bad configuration, which must be one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        load(folder, words, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


names = st.text(min_size=1, max_size=8)
counts = st.integers(1, 2**62)
rates = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
shares = st.floats(min_value=0, max_value=1, exclude_max=True)
lists_of_names = st.lists(names, unique=True, max_size=3).map(tuple)
per_mini = st.integers(1, 9) | st.tuples(st.integers(1, 9), st.integers(1, 9))
configs = st.builds(
    RunConfig,
    model=st.builds(ModelConfig, name=names, dtype=st.sampled_from(["float32", "bfloat16"])),
    adapter=st.builds(
        AdapterConfig,
        n=st.just(2),
        r=per_mini,
        alpha=rates | st.tuples(rates, rates),
        dropout=shares,
        targets=st.just("all-linear") | names.map(re.escape) | lists_of_names,
        layers=st.none() | st.lists(counts, min_size=1, max_size=3).map(tuple),
        n_pattern=st.dictionaries(names.map(re.escape), st.just(2), max_size=2),
        rank_pattern=st.dictionaries(names.map(re.escape), per_mini, max_size=2),
        alpha_pattern=st.dictionaries(names.map(re.escape), rates, max_size=2),
    ),
    data=st.builds(
        DataConfig,
        train=names,
        validation=names,
        text=st.lists(names.filter("label".__ne__), unique=True, max_size=2).map(tuple),
        label_names=st.lists(names, unique=True, min_size=2, max_size=3).map(tuple),
        train_limit=st.none() | counts,
    ),
    optim=st.builds(OptimConfig, learning_rate=rates, head_learning_rate=st.none() | rates, warmup_ratio=shares),
    train=st.builds(TrainConfig, epochs=counts, max_steps=st.none() | counts, metric=st.none() | st.just("loss")),
    output=st.builds(OutputConfig, folder=names),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@settings(max_examples=50)
@given(configs)
def test_toml_round_trip(folder, config):
    assert load(folder, text=to_toml(config)) == config


def test_a_key_that_may_be_none_is_none_by_default():
    # TOML has no null: to_toml leaves such a key out, so its default must be what left out means.
    for section in SECTIONS.values():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            assert (type(None) in typing.get_args(hints[field.name])) == (field.default is None), field.name


def test_adapter_keys_are_the_librarys_arguments():
    library = {field.name: field for field in dataclasses.fields(MELoRAConfig)}
    ours = {field.name: field for field in dataclasses.fields(AdapterConfig)}
    assert set(library) - set(ours) == {"dtype", "train_base", "variant"}
    assert set(ours) - set(library) == {"method"}
    assert melora_config(AdapterConfig()) == MELoRAConfig(targets=["query", "value"], modules_to_save=["classifier"])
    for name in ("scaling", "mixer", "strategy", "init", "bias"):
        assert typing.get_type_hints(AdapterConfig)[name] == typing.get_type_hints(MELoRAConfig)[name] | None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optim.learning_rate 2e-3", {"optim.learning_rate": 2e-3}),
        ("--train.max_steps=7 --train.tensorboard", {"train.max_steps": 7, "train.tensorboard": True}),
        ("--adapter.n 2 --adapter.r 2 4", {"adapter.n": 2, "adapter.r": (2, 4)}),
        ("--adapter.r 3 --adapter.alpha 8", {"adapter.r": 3, "adapter.alpha": 8.0}),
        ("--adapter.targets query", {"adapter.targets": ("query",)}),
        ("--adapter.targets attn.q attn/v", {"adapter.targets": ("attn.q", "attn/v")}),
        ("--adapter.targets .*/(query|key)", {"adapter.targets": ".*/(query|key)"}),
        ("--adapter.targets all-linear", {"adapter.targets": "all-linear"}),
        ("--adapter.targets --adapter.layers 0 2", {"adapter.targets": (), "adapter.layers": (0, 2)}),
        (
            "--adapter.rank_pattern 0/q=4 .*(?=v)=2,1",
            {"adapter.rank_pattern": {"0/q": 4, ".*(?=v)": (2, 1)}, "adapter.n": 2},
        ),
        ("--adapter.alpha_pattern q=0.5", {"adapter.alpha_pattern": {"q": 0.5}}),
        ("--data.name None --data.train a.csv --data.validation b.csv", {"data.name": None, "data.train": "a.csv"}),
        ("--data.name me/set --data.text premise claim", {"data.text": ("premise", "claim")}),
        ("--train.no_tensorboard --train.log-every 5", {"train.tensorboard": False, "train.log_every": 5}),
        ("--output.folder else/where", {"output.folder": "else/where"}),
    ],
)
def test_overrides(tmp_path, words, expected):
    text = MINIMAL + "[adapter]\nn = 2\n[adapter.rank_pattern]\nquery = 3\n"
    config = load(tmp_path, words, text)
    plain = load(tmp_path, text=text)
    for key, value in expected.items():
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == value
    changed = {
        f"{section}.{name}"
        for section in SECTIONS
        for name, value in vars(getattr(config, section)).items()
        if value != getattr(getattr(plain, section), name)
    }
    assert changed <= {*expected, "data.validation", "data.name"}


def test_an_override_completes_a_recipe_and_no_recipe_is_incomplete(tmp_path):
    assert load(tmp_path, "--model.name m --data.name glue/rte", text="").model.name == "m"
    assert "model.name is not set" in error_of(tmp_path, text='[data]\nname = "glue/rte"\n')
    assert "data.name (a hub data set), or both files" in error_of(tmp_path, text='[model]\nname = "m"\n')
    with pytest.raises(ValueError, match=r"output\.folder is not set"):
        RunConfig(ModelConfig("m"), data=DataConfig("glue/rte"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.learning_rate 0", "optim.learning_rate=0.0 must be above 0 and finite"),
        ("--optim.learning_rate nan", "optim.learning_rate=nan must be above 0 and finite"),
        ("--optim.head_learning_rate inf", "optim.head_learning_rate=inf must be above 0 and finite"),
        ("--optim.warmup_ratio 1", "optim.warmup_ratio=1.0 must be at least 0 and below 1"),
        ("--optim.weight_decay -0.1", "optim.weight_decay=-0.1 must be at least 0 and finite"),
        ("--train.seed -1", "train.seed=-1 must be at least 0 and below 4294967296"),
        ("--train.epochs 0", "train.epochs=0 must be at least 1 and finite"),
        ("--train.patience 0", "train.patience=0 must be at least 1"),
        ("--data.max_length 7", "data.max_length=7 must be at least 8"),
        ("--train.batch_size 6 --train.accumulate 4", "4 does not divide train.batch_size=6; choose from 1, 2, 3, 6"),
        ("--train.metric f1", "train.metric='f1' is not computed here; choose from accuracy, loss"),
        ("--data.train a.csv", "data.name='glue/rte', data.train='a.csv', data.validation=None: give"),
        ("--data.name None --data.train a.csv", "data.name=None, data.train='a.csv', data.validation=None: give"),
        ("--data.subset rte", "data.subset='rte' chooses within a hub data set other than glue/...; unset it"),
        ("--data.name None --data.train a --data.validation b --data.validation_split t", "split='t' chooses"),
        ("--data.name glue/rtee", "data.name='glue/rtee' is not a GLUE task; choose glue/cola, "),
        ("--model.task regression", "'glue/rte' is a classification task, not regression; set model.task to "),
        ("--data.text a b c", "data.text=['a', 'b', 'c'] and data.label='label' must be different columns"),
        ("--data.text a a", "must be different columns"),
        ("--data.text label", "must be different columns"),
        ("--data.label_names x", "data.label_names=['x'] must be two or more different names"),
        ("--data.label_names x x", "data.label_names=['x', 'x'] must be two or more different names"),
        ("--data.buckets 32 16", "data.buckets=[32, 16] must be rising widths"),
        ("--data.buckets", "data.buckets=[] must be rising widths"),
        ("--adapter.n 0", "[adapter] n=0 must be a whole number of at least 1"),
        ("--adapter.targets .*(", "[adapter] targets: '.*(' is not a regular expression"),
        ("--adapter.n 3 --adapter.r 1 2", "[adapter] r=[1, 2] has 2 values for n=3 minis"),
    ],
)  # fmt: skip
def test_bad_values_name_key_value_and_remedy(tmp_path, words, message):
    assert message in error_of(tmp_path, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.learning_rat 1", "unknown option --optim.learning_rat; perhaps optim.learning_rate"),
        ("--optim.lr=1", "unknown option --optim.lr; there are learning_rate, head_learning_rate, "),
        ("--train.learning-rate 1", "unknown option --train.learning_rate; perhaps optim.learning_rate"),
        ("--epochs 1", "unknown option --epochs; perhaps train.epochs"),
        ("--train.no_epochs", "unknown option --train.no_epochs; perhaps train.epochs"),
    ],
)
def test_an_unknown_option_is_told_in_one_line(tmp_path, words, message):
    assert message in error_of(tmp_path, words)


def test_label_names_with_regression(tmp_path):
    text = '[model]\nname = "m"\ntask = "regression"\n[data]\nname = "glue/stsb"\n'
    assert load(tmp_path, text=text).metric == "pearson"
    assert "data.label_names belongs to classification" in error_of(tmp_path, "--data.label_names a b", text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train.epochs three", "--train.epochs"),
        ("--adapter.rank_pattern query", "PATH=VALUE"),
        ("--adapter.mixer al", "identity"),
    ],
)
def test_an_options_bad_value_exits_with_2_and_is_explained(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        load(tmp_path, words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_key(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        load(tmp_path, "--help")
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            assert f"--{name}.{field.name}" in help_text
    assert "Mini-adapters a layer" in help_text


def test_whole_numbers_serve_as_floats(tmp_path):
    config = load(tmp_path, text=MINIMAL + "[adapter]\nn = 2\nalpha = [8, 4]\n[optim]\nweight_decay = 0\n")
    assert config.adapter.alpha == (8.0, 4.0)
    assert type(config.adapter.alpha[0]) is type(config.optim.weight_decay) is float
    assert math.copysign(1, config.optim.weight_decay) == 1
