"""Populations through the application: members' folders are those of their lone runs, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import train.loop.bookkeeping
from tests.support.tiny_run import make_material, recipe
from train.config.run_config import RunConfig, from_toml
from train.loop.loop import Outcome, run
from train.loop.population import group, require_population, run_population
from train.loop.setup import prepare
from train.run_folder.folder import read_run, resume_command
from train.run_folder.log import read_metrics

COMMAND = ["python", "-m", "train", "sweep", "my.toml", "--resume"]
OF_TIME = {"seconds", "examples_per_second", "tokens_per_second", "memory_bytes"}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def settings(material: Path, folder: Path, **sections: dict) -> RunConfig:
    return from_toml(recipe(material, **{"output": {"folder": str(folder)}} | sections))


def varied(config: RunConfig, **values: object) -> RunConfig:
    """The configuration with some of its keys changed, `optim__learning_rate=...`."""
    for name, value in values.items():
        section, key = name.split("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


def members_of(material: Path, folder: Path) -> list[RunConfig]:
    """Three runs of 50 steps that differ in all that they may, the last of which is bound to diverge."""
    train = {"epochs": 8, "max_steps": 50, "eval_every": 10, "accumulate": 2, "data_seed": 3}
    config = settings(material, folder / "a", train=train)
    other = {"train__seed": 8, "adapter__alpha": 12.0, "adapter__dropout": 0.0, "optim__learning_rate": 1e-2}
    return [
        config,
        varied(config, **other, optim__head_learning_rate=2e-3, output__folder=str(folder / "b")),
        varied(config, optim__learning_rate=1e30, output__folder=str(folder / "c")),
    ]


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory) -> tuple[Path, list[Outcome]]:
    """The folder and the outcomes of a population that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_population(members_of(material, folder), folder / "population", COMMAND)


def events(folder: Path, kind: str) -> list[dict]:
    """A run's events without what depends on the clock."""
    found = [event for event in read_metrics(folder) if event["kind"] == kind]
    return [{key: value for key, value in event.items() if key not in OF_TIME} for event in found]


def assert_same_run(one: Path, other: Path, rtol: float) -> None:
    for kind in ("train", "eval"):
        ours, theirs = events(one, kind), events(other, kind)
        assert len(ours) == len(theirs) > 0
        for found, wanted in zip(ours, theirs, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key] == (value if isinstance(value, str) else pytest.approx(value, rel=rtol)), key
    ours, theirs = (load_file(folder / "adapter" / "melora_adapter.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=rtol, atol=rtol, err_msg=key)
    for name in ("sites.json", "versions.json", "adapter/melora_config.json"):
        assert (one / name).exists() == (other / name).exists()
        if (other / name).exists():
            assert (one / name).read_text() == (other / name).read_text(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_member_leaves_what_its_lone_run_leaves(whole, tmp_path, name):
    """After 50 steps, beside one that has diverged; the lone run is made from the member's own config.toml."""
    folder, outcomes = whole
    lone = from_toml(folder / name / "config.toml", ["--output.folder", str(tmp_path / name)])
    outcome = run(prepare(lone))
    assert_same_run(folder / name, tmp_path / name, 1e-5)
    member = outcomes["ab".index(name)]
    assert (member.step, member.best, member.diverged) == (50, pytest.approx(outcome.best), None)
    found = read_run(folder / name)
    assert found.spectra
    assert found.best is not None
    assert (folder / name / "peft").is_dir()
    assert resume_command(folder / name) == " ".join(COMMAND)


def test_a_member_that_diverges_stops_nobody_else(whole):
    folder, outcomes = whole
    end = outcomes[2]
    assert end.diverged is not None
    assert end.step == end.diverged < 10
    assert end.best is None
    assert all(np.isfinite(event["loss"]) for event in events(folder / "c", "train"))
    assert len(events(folder / "c", "train")) < end.diverged
    assert (folder / "c" / "report.html").exists()


def test_a_population_that_has_ended_is_not_trained_again(whole, material, monkeypatch):
    folder, outcomes = whole
    monkeypatch.setattr("train.loop.population.population", None)
    configs = members_of(material, folder)
    assert run_population(configs, folder / "population", COMMAND, resume=True) == outcomes
    with pytest.raises(ValueError, match=r"^optim\.learning_rate is 0\.5, but 0\.005 in the run"):
        run_population(
            [varied(configs[0], optim__learning_rate=0.5), *configs[1:]], folder / "population", COMMAND, resume=True
        )
    with pytest.raises(ValueError, match=r"^the population had 3 members, and not 2"):
        run_population(configs[:2], folder / "population", COMMAND, resume=True)
    with pytest.raises(ValueError, match=r"part of a population; continue that with `python -m train sweep my\.toml"):
        run_population(configs, folder / "population", COMMAND)


def interrupted(material: Path, folder: Path, monkeypatch, step: int, how) -> list[RunConfig]:
    """A population on which `how` falls when it reports `step`."""
    report = train.loop.bookkeeping.Book.report

    def with_a_blow(self, done: int) -> None:
        report(self, done)
        if done == step:
            how()

    with monkeypatch.context() as patch:
        patch.setattr(train.loop.bookkeeping.Book, "report", with_a_blow)
        configs = members_of(material, folder)
        try:
            outcomes = run_population(configs, folder / "population", COMMAND)
        except ZeroDivisionError:
            return configs
    assert [outcome.stopped_by for outcome in outcomes] == [signal.SIGTERM] * 3
    return configs


def blow() -> None:
    raise ZeroDivisionError  # as good as kill -9: nothing is saved, nothing tidied


def nudge() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "how"), [(5, blow), (23, blow), (23, nudge)])
def test_interrupted_and_resumed_equals_uninterrupted(whole, material, tmp_path, monkeypatch, step, how):
    """Also before the first checkpoint. Every loss and the adapters are the same bits."""
    folder, outcomes = whole
    configs = interrupted(material, tmp_path, monkeypatch, step, how)
    with pytest.raises(ValueError, match="part of a population"):
        run_population(configs, tmp_path / "population", COMMAND)
    assert run_population(configs, tmp_path / "population", COMMAND, resume=True) == outcomes
    for name in "ab":
        assert_same_run(tmp_path / name, folder / name, 0.0)
    assert events(tmp_path / "c", "train") == events(folder / "c", "train")


@pytest.mark.slow
def test_own_orders_of_rows(material, tmp_path):
    """Without a common data_seed each member sees its own batches, which then must be of one width."""
    config = settings(material, tmp_path / "a", data={"buckets": [24]}, train={"max_steps": 10, "eval_every": 10})
    configs = [config, varied(config, train__seed=8, output__folder=str(tmp_path / "b"))]
    run_population(configs, tmp_path / "population", COMMAND)
    for one in configs:
        lone = varied(one, output__folder=one.output.folder + "-lone")
        run(prepare(lone))
        assert_same_run(Path(one.output.folder), Path(lone.output.folder), 1e-5)
    several = [varied(one, data__buckets=(12,), output__folder=one.output.folder + "-wide") for one in configs]
    with pytest.raises(
        ValueError, match=r"differ in train\.data_seed see batches of different widths at one step .12 to 24 tok"
    ):
        run_population(several, tmp_path / "wide", COMMAND)
    assert not (tmp_path / "wide").exists()


@pytest.mark.slow
def test_each_member_has_its_own_patience(material, tmp_path):
    train = {"epochs": 50, "eval_every": 2, "patience": 2, "data_seed": 1, "max_steps": 14}
    config = settings(material, tmp_path / "a", train=train, optim={"learning_rate": 1e-12})
    configs = [config, varied(config, optim__learning_rate=2e-12, output__folder=str(tmp_path / "b"))]
    outcomes = run_population(configs, tmp_path / "population", COMMAND)
    assert [max(event["step"] for event in events(tmp_path / name, "train")) for name in "ab"] == [6, 6]
    assert [outcome.step for outcome in outcomes] == [6, 6]


def test_groups_are_of_equal_shapes(material, tmp_path):
    config = settings(material, tmp_path / "a")
    four = varied(config, adapter__n=1)
    patterned = varied(config, adapter__alpha_pattern={"query": 3.0})
    configs = [
        config,
        four,
        varied(config, optim__learning_rate=1.0),
        varied(four, adapter__dropout=0.5),
        varied(patterned, adapter__alpha=2.0),
        varied(patterned, adapter__alpha=4.0),
        varied(config, train__seed=1, adapter__alpha=3.0, optim__weight_decay=0.0),
    ]
    assert group(configs) == [[0, 2, 6], [1, 3], [4], [5]]


def test_what_is_no_population(material, tmp_path):
    config = settings(material, tmp_path / "a")
    elsewhere = varied(config, output__folder=str(tmp_path / "b"))
    for message, configs in {
        "a population of no runs": [],
        "adapter.n is 3 in one run and 1 in another": [config, varied(elsewhere, adapter__n=1)],
        "train.batch_size is 8 in one run and 4 in another": [config, varied(elsewhere, train__batch_size=4)],
        "mesh.data=2: a population runs on one device so far": [varied(config, mesh__data=2)],
        f"two runs have the output.folder {tmp_path / 'a'}": [config, varied(config, train__seed=1)],
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            require_population(configs)


def test_a_lone_run_is_not_taken_over(material, tmp_path):
    config = settings(material, tmp_path / "a", train={"max_steps": 1})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"^{tmp_path / 'a'} holds a run already"):
            run_population([config], tmp_path / "population", COMMAND, resume=resume)
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["metrics.jsonl"]


def test_outcomes_are_plain_json(whole):
    found = json.loads((whole[0] / "population" / "outcomes.json").read_text())
    assert [one["step"] for one in found[:2]] == [50, 50]
