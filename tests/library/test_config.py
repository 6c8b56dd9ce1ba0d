"""MELoRAConfig and AdapterSpec: scales by hand, JSON there and back, and what each wrong value is told."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import math
import re
from typing import Any

import pytest

import melora_jax as mj
from melora_jax.config import AdapterSpec, first_match, is_suffix, matches

FULL: dict[str, Any] = {
    "n": 3,
    "r": [1, 2, 4],
    "alpha": [4, 8.5, 16],
    "dropout": 0.25,
    "scaling": "rslora",
    "mixer": "identity",
    "strategy": "packed",
    "targets": ["query", "self.value"],
    "exclude": r".*/7/.*",
    "layers": [0, 2],
    "n_pattern": {"layer.2.query": 1},
    "rank_pattern": {"layer.2.query": 8, "value": [1, 1, 2]},
    "alpha_pattern": {"layer.2.query": 32},
    "modules_to_save": ["classifier"],
    "bias": "lora_only",
    "train_base": False,
    "init": "gaussian",
    "dtype": "bfloat16",
    "variant": "dora",
}


def config(**changes: Any) -> mj.MELoRAConfig:
    settings: dict[str, Any] = {"targets": ["query"]}
    return mj.MELoRAConfig(**(settings | changes))


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [("mini", (4.0, 4.0, 4.0)), ("total", (4 / 7, 8 / 7, 16 / 7)), ("rslora", tuple(v / 7**0.5 for v in (4, 8, 16)))],
)
def test_scales_of_mixed_ranks_and_alphas(scaling: Any, expected: tuple[float, ...]) -> None:
    spec = AdapterSpec(n=3, r=(1, 2, 4), alpha=(4.0, 8.0, 16.0), scaling=scaling)
    assert spec.scales == pytest.approx(expected, rel=1e-15)


def test_authors_defaults_give_scale_alpha_over_mini_rank() -> None:
    assert config(n=8, r=1).spec("query").scales == (16.0,) * 8
    assert config(n=1, r=64).spec("query").scales == (0.25,)


@pytest.mark.parametrize(
    ("mixer", "n", "r", "rank"),
    [("identity", 3, (1, 2, 4), 7), ("identity", 2, (4, 4), 8), ("shuffle", 2, (4, 4), 8), ("all", 2, (4, 4), 4)],
)
def test_rank_and_parameters(mixer: Any, n: int, r: tuple[int, ...], rank: int) -> None:
    spec = AdapterSpec(n=n, r=r, alpha=(1.0,) * n, mixer=mixer)
    assert spec.rank == rank
    assert spec.parameters(6, 30) == sum(mini * (6 // n + 30 // n) for mini in r)


def test_json_there_and_back() -> None:
    assert FULL.keys() == {field.name for field in dataclasses.fields(mj.MELoRAConfig)}
    full = mj.MELoRAConfig(**FULL)
    back = mj.MELoRAConfig.from_json(full.to_json())
    assert back == full
    assert hash(back) == hash(full)
    assert json.loads(full.to_json()) == FULL
    assert list(json.loads(full.to_json())) == [field.name for field in dataclasses.fields(mj.MELoRAConfig)]
    assert dataclasses.asdict(back)["rank_pattern"] == {"layer.2.query": 8, "value": (1, 1, 2)}


@pytest.mark.parametrize("key", sorted(FULL.keys() - {"n", "targets", "mixer", "train_base"}))
def test_a_changed_field_makes_another_config(key: str) -> None:
    plain = config(n=3)
    other = dataclasses.replace(plain, **{key: FULL[key]})
    assert other != plain
    assert len({plain, other, config(n=3)}) == 2


def test_equal_configs_hash_equal_however_they_are_written() -> None:
    one = config(targets=["query"], alpha=16, r=[1, 2], n=2, layers=[0], alpha_pattern={"query": 8})
    other = config(targets=("query",), alpha=16.0, r=(1, 2), n=2, layers=(0,), alpha_pattern={"query": 8.0})
    assert one == other
    assert hash(one) == hash(other)


def test_the_order_of_patterns_counts() -> None:
    one = config(rank_pattern={"self.query": 2, "query": 3})
    other = config(rank_pattern={"query": 3, "self.query": 2})
    assert one != other
    assert (one.spec("self/query").r[0], other.spec("self/query").r[0]) == (2, 3)


def test_overrides_reach_their_site_alone() -> None:
    full = mj.MELoRAConfig(**FULL)
    other, value, query = full.spec("layer/0/query"), full.spec("layer/2/value"), full.spec("layer/2/query")
    assert (other.n, other.r, other.alpha) == (3, (1, 2, 4), (4.0, 8.5, 16.0))
    assert (value.n, value.r, value.alpha) == (3, (1, 1, 2), (4.0, 8.5, 16.0))
    assert (query.n, query.r, query.alpha) == (1, (8,), (32.0,))
    shared = {"dropout": 0.25, "scaling": "rslora", "strategy": "packed", "init": "gaussian", "dtype": "bfloat16"}
    assert {key: getattr(query, key) for key in shared} == shared


@pytest.mark.parametrize(
    ("pattern", "path", "suffix", "found"),
    [
        ("query", "layer/0/self/query", True, True),
        ("self.query", "layer/0/self/query", True, True),
        ("self/query", "layer/0/self/query", True, True),
        ("layer/0/self/query", "layer/0/self/query", True, True),
        ("uery", "layer/0/self/query", False, False),
        ("layer", "layer/0/self/query", False, False),
        (r"layer/\d/.*query", "layer/0/self/query", False, True),
        (r"layer\.\d\..*query", "layer/0/self/query", False, True),
        (r"layer/[13]/.*", "layer/0/self/query", False, False),
        (r"quer", "query", False, False),
    ],
)
def test_suffixes_and_regular_expressions(pattern: str, path: str, suffix: bool, found: bool) -> None:
    assert is_suffix(pattern, path) is suffix
    assert matches(pattern, path) is found
    assert first_match({"nothing": 1, pattern: 2, ".*": 3}, path, 0) == (2 if found else 3)


ESCAPE = "escape it, or list names instead"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n=0 must be a whole number of at least 1"),
    ({"n": True}, "n=True must be a whole number of at least 1"),
    ({"n": [2]}, "n=[2] must be a whole number of at least 1"),
    ({"n_pattern": {"query": 2.5}}, "n=2.5 must be a whole number of at least 1"),
    ({"r": 0}, "r=0 must be a whole number of at least 1, or a list with one for each mini"),
    ({"r": [1, 0], "n": 2}, "r=0 must be a whole number of at least 1, or a list with one for each mini"),
    ({"r": "4"}, "r='4' must be a whole number of at least 1, or a list with one for each mini"),
    ({"rank_pattern": {"query": -1}}, "r=-1 must be a whole number of at least 1, or a list with one for each mini"),
    ({"r": [1, 2]}, "r=[1, 2] has 2 values for n=8 minis; give one value, or 8"),
    ({"alpha": [1, 2]}, "alpha=[1.0, 2.0] has 2 values for n=8 minis; give one value, or 8"),
    ({"alpha": 0}, "alpha=0.0 must be a number above 0"),
    ({"alpha": math.inf}, "alpha=inf must be a number above 0"),
    ({"alpha": "16"}, "alpha='16' must be a number above 0"),
    ({"alpha_pattern": {"query": math.nan}}, "alpha=nan must be a number above 0"),
    ({"dropout": 1.0}, "dropout=1.0 must be a number at least 0 and below 1"),
    ({"dropout": -0.1}, "dropout=-0.1 must be a number at least 0 and below 1"),
    ({"scaling": "rs-lora"}, "scaling='rs-lora' is unknown; choose 'rslora'"),
    ({"mixer": "gralora"}, "mixer='gralora' is unknown; choose 'identity' or 'all' or 'shuffle' or 'scatter'"),
    ({"strategy": "pack"}, "strategy='pack' is unknown; choose 'packed'"),
    (
        {"strategy": "merged", "dropout": 0.1},
        "strategy='merged' has no input of the adapter's own to drop from: use dropout=0, not 0.1",
    ),
    ({"init": "zeros"}, "init='zeros' is unknown; choose 'kaiming' or 'gaussian' or 'orthogonal' or 'pissa'"),
    ({"dtype": "float23"}, "dtype='float23' is unknown; choose 'float32'"),
    (
        {"mixer": "all", "n": 2, "r": [1, 2]},
        'mixer="all" needs one r for all minis, not [1, 2]; use mixer="identity"',
    ),
    (
        {"mixer": "shuffle", "n": 4, "r": 6},
        'mixer="shuffle" needs n to divide r: n=4, r=6; choose r from multiples of 4',
    ),
    (
        {"targets": []},
        'nothing to train: targets and modules_to_save are both empty; name layers, e.g. targets=["query", "value"]',
    ),
    ({"targets": 3}, "targets=3 must be a list of module names, or one string"),
    ({"targets": ["query", 3]}, "targets=['query', 3] must be a list of module names, or one string"),
    ({"targets": [""]}, "targets=[''] must be a list of module names, or one string"),
    ({"modules_to_save": "head"}, "modules_to_save='head' is one string; give a list: ['head']"),
    ({"modules_to_save": [None]}, "modules_to_save=[None] must be a list of module names"),
    (
        {"targets": "layer/(0"},
        "targets: 'layer/(0' is not a regular expression (missing ), unterminated subpattern at position 6); " + ESCAPE,
    ),
    (
        {"rank_pattern": {"*query": 2}},
        "rank_pattern: '*query' is not a regular expression (nothing to repeat at position 0); " + ESCAPE,
    ),
    ({"layers": 3}, "layers=3 must be a list of layer numbers, such as [0, 1], or None for all"),
    ({"layers": [-1]}, "layers=[-1] must be a list of layer numbers, such as [0, 1], or None for all"),
    ({"layers": []}, "layers=[] must be a list of layer numbers, such as [0, 1], or None for all"),
    (
        {"n_pattern": ["query"]},
        "n_pattern=['query'] must map path suffixes to values, such as {\"attention.self.query\": 4}",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_values_say_what_and_what_to_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        config(**changes)


def test_overrides_that_do_not_fit_name_their_site() -> None:
    bad = config(n=2, r=[1, 2], n_pattern={"layer.1.query": 3})
    with pytest.raises(ValueError, match=r"^r=\[1, 2\] has 2 values for n=3 minis; .* \(at layer/1/query\)$"):
        bad.spec("layer/1/query")


PEFT = {
    "target_modules": 'called targets here: MELoRAConfig(targets=["query", "value"])',
    "exclude_modules": "called exclude here: ",
    "lora_r": "called r here, ",
    "lora_alpha": "called alpha here: MELoRAConfig(alpha=16)",
    "lora_dropout": "called dropout here: MELoRAConfig(dropout=0.05)",
    "layers_to_transform": "called layers here: MELoRAConfig(layers=[0, 1])",
    "layers_pattern": "not needed: ",
    "use_rslora": 'called scaling here: MELoRAConfig(scaling="rslora")',
    "use_dora": 'called variant here: MELoRAConfig(variant="dora")',
    "init_lora_weights": 'called init here: MELoRAConfig(init="kaiming")',
    "lora_bias": "not there: ",
    "task_type": "not a setting of the adapter: ",
    "peft_type": "not a setting: ",
    "base_model_name_or_path": "not a setting: ",
    "inference_mode": "not a setting: ",
    "fan_in_fan_out": "not needed: ",
}


@pytest.mark.parametrize(("name", "message"), PEFT.items())
def test_words_of_peft_are_told_ours(name: str, message: str) -> None:
    """In Python, and in a file that was written for PEFT."""
    with pytest.raises(TypeError, match=f"^{re.escape(f'{name} is {message}')}[^\n]*$"):
        config(**{name: None})
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name} is {message}')}[^\n]*$"):
        mj.MELoRAConfig.from_json(json.dumps({"targets": ["query"], name: None}))


def test_hints_for_peft_are_settings_that_work() -> None:
    for text in re.findall(r"MELoRAConfig\([^)]*\)", "\n".join(map(unknown, PEFT))):
        call: Any = ast.parse(text, mode="eval").body
        config(**{given.arg: ast.literal_eval(given.value) for given in call.keywords})


def unknown(name: str) -> str:
    with pytest.raises(TypeError) as found:
        config(**{name: None})
    return str(found.value)


def test_words_that_are_peft_s_and_ours_are_taken() -> None:
    for bias in ("none", "all", "lora_only"):
        assert config(bias=bias, modules_to_save=["head"], r=2, rank_pattern={"query": 4}).bias == bias


def test_an_unknown_word_is_told_the_nearest() -> None:
    assert unknown("dropuot") == "unknown key 'dropuot' in MELoRAConfig; perhaps 'dropout'"
    assert unknown("zzz").startswith("unknown key 'zzz' in MELoRAConfig; known are n, r, alpha,")


def test_a_config_can_be_copied_and_replaced() -> None:
    one = config(n=2, dropout=0.5)
    assert copy.deepcopy(one) == dataclasses.replace(one) == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the adapter config is not JSON: Expecting property name"),
        ("[]", "the adapter config must be a JSON object, not list"),
        ('{"target": ["query"]}', "unknown key 'target' in the adapter config; perhaps 'targets'"),
        ('{"zzz": 1}', "unknown key 'zzz' in the adapter config; known are n, r, alpha,"),
        ('{"targets": ["query"], "n": "8"}', "n='8' must be a whole number of at least 1"),
        ('{"targets": ["query"], "layers": null, "n_pattern": null}', "n_pattern=None must map path suffixes"),
    ],
)
def test_bad_json_says_what(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        mj.MELoRAConfig.from_json(text)
