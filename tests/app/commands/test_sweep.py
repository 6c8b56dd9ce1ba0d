"""`python -m train sweep`: grids, the groups they make, their results, and going on after an interruption."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import train.commands.sweep
from tests.support.tiny_run import make_material, recipe
from train.__main__ import main
from train.commands.sweep import plan, settings_scores
from train.lab.tables.grid import parse_grid, points_of
from train.loop.loop import Outcome
from train.run_folder.folder import read_run


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def place(material, tmp_path) -> Path:
    """A recipe of three short steps, whose runs go below `tmp_path`/sweep."""
    train = {"max_steps": 3, "eval_every": 3}
    written = recipe(material, train=train, data={"buckets": [24]}, output={"folder": str(tmp_path / "sweep")})
    return written.rename(tmp_path / "my.toml")


def test_a_grid_is_every_combination_and_every_seed(place):
    grid = parse_grid(["optim.learning-rate=1e-3,2e-3", "adapter.targets=query,query value"])
    points = points_of(place, ["--train.epochs", "1"], grid, seeds=2, own_order=False)
    assert len(points) == 8
    assert [point.name for point in points[:3]] == [
        "learning_rate=1e-3,targets=query,seed=7",
        "learning_rate=1e-3,targets=query,seed=8",
        "learning_rate=1e-3,targets=query_value,seed=7",
    ]
    last = points[-1].config
    assert (last.optim.learning_rate, last.adapter.targets, last.train.seed) == (2e-3, ("query", "value"), 8)
    assert {(point.config.data_seed, point.config.train.epochs) for point in points} == {(7, 1)}
    assert Path(last.output.folder).name == points[-1].name
    assert [[point.config.train.seed for point in group] for group in plan(points)] == [[7, 8, 7, 8]] * 2
    own = points_of(place, [], {}, seeds=3, own_order=True)
    assert [point.config.data_seed for point in own] == [7, 8, 9]
    assert points_of(place, ["--train.data_seed", "5"], {}, seeds=2, own_order=False)[1].config.data_seed == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to vary; give --seeds 8, or --grid KEY=VALUE,VALUE"),
        ("--seeds 0", "--seeds 0 makes a grid of zero runs; give at least 1"),
        ("--grid adapter.n", "--grid 'adapter.n' must be KEY=VALUE,VALUE with no value empty, e.g. adapter.n=1,4,8"),
        ("--grid adapter.n=", "--grid 'adapter.n=' must be KEY=VALUE,VALUE with no value empty, e.g. adapter.n=1,4,8"),
        ("--grid adapter.n=1,,3", "--grid 'adapter.n=1,,3' must be KEY=VALUE,VALUE with no value empty"),
        ("--grid optim.lr=1,2", "--grid: unknown key optim.lr; there are learning_rate, "),
        ("--grid adapter.drop_out=0,0.1", "--grid: unknown key adapter.drop_out; perhaps adapter.dropout"),
        ("--grid adapter.n=1,3 adapter.n=2", "--grid names adapter.n twice; give all its values once"),
        ("--grid adapter.n=1,3,1", "--grid gives adapter.n the value 1 twice; give it once"),
        ("--grid optim.learning_rate=1e-3,0.001", "--grid makes the same run twice, as learning_rate=1e-3 and as"),
        ("--grid mesh.data=1,2", "--grid can't vary mesh.data: it changes no result; leave it out"),
        ("--grid output.folder=a,b", "--grid can't vary output.folder: each run gets a folder of its own below it"),
        ("--grid train.metric=loss,accuracy", "--grid can't vary train.metric: runs ranked by different metrics"),
        ("--seeds 2 --grid train.seed=1,2", "--seeds and --grid train.seed=... both vary train.seed; give one of them"),
        ("--grid adapter.n=1,5 --adapter.dropuot 0.1", "unknown option --adapter.dropuot; perhaps adapter.dropout"),
        ("--grid adapter.dropout=0.1,1.5", "[adapter] dropout=1.5"),
        ("--grid adapter.n=1,5", "n=5 does not divide d_in=12"),
        ("--seeds 2 --mesh.data 2", "mesh.data=2: a population runs on one device so far"),
        ("--seeds 2 --at-once 0", "--at-once 0 must be at least 1"),
        ("--seeds 2 --resume", "holds no sweep to resume; start it without --resume"),
    ],
)
def test_bad_grids_are_found_before_work_starts(place, capsys, words, message):
    before = sorted(place.parent.iterdir())
    assert main(["sweep", str(place), *words.split()]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert sorted(place.parent.iterdir()) == before


def test_which_recipe(capsys):
    assert main(["sweep", "--seeds", "8"]) == 2
    assert "which recipe? e.g. python -m train sweep train/recipes/local.toml --seeds 8" in capsys.readouterr().err


def test_dry_run_says_what_would_be_trained_together(place, capsys):
    assert main(["sweep", str(place), "--seeds", "2", "--grid", "adapter.n=1,3", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "population 1: n=1,seed=7, n=1,seed=8",
        "population 2: n=3,seed=7, n=3,seed=8",
    ]
    assert not (place.parent / "sweep").exists()


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(place, capsys, monkeypatch):
    """The first population is trained, the second broken off; then the first is kept and the second trained."""
    words = ["sweep", str(place), "--seeds", "2", "--grid", "adapter.n=1,3"]
    folder, once = place.parent / "sweep", train.commands.sweep.run_population

    def stopped_at_the_second(configs, own, *rest):
        if own.name == "2":
            return [Outcome(None, 1, stopped_by=15)] * len(configs)
        return once(configs, own, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train.commands.sweep, "run_population", stopped_at_the_second)
        assert main(words) == 128 + 15
    said = capsys.readouterr().out
    assert f"stopped; continue with: python -m train {' '.join(words)} --resume" in said
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert (folder / "populations" / "1" / "outcomes.json") in kept
    assert main(words) == 2
    assert "holds a sweep already; add --resume to continue" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    _check_results(folder, capsys.readouterr().out)
    assert main([*words, "--resume"]) == 0
    member = folder / "n=3,seed=8"
    assert main(["run", str(member / "config.toml"), "--resume"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{member} is part of a population; continue that with `python -m train {words[0]}" in error


def _check_results(folder: Path, said: str) -> None:
    rows = json.loads((folder / "sweep.json").read_text())
    assert [(row["adapter.n"], row["train.seed"]) for row in rows] == [("1", "7"), ("1", "8"), ("3", "7"), ("3", "8")]
    for row in rows:
        run = read_run(row["folder"])
        assert run.best is not None
        assert run.best["accuracy"] == row["accuracy"]
        assert run.setting("adapter", "n") == int(row["adapter.n"])
        assert run.setting("train", "data_seed") == 7
        assert {"adapter", "peft", "report.html"} <= {entry.name for entry in run.folder.iterdir()}
    assert "n=3,seed=8" in (folder / "report.html").read_text()
    for n in ("1", "3"):
        scores = [row["accuracy"] for row in rows if row["adapter.n"] == n]
        assert re.search(rf"n={n} +2 +{sum(scores) / 2:.4f} ", said), said


def test_scores_are_gathered_over_seeds(place):
    points = points_of(place, [], parse_grid(["adapter.n=1,3"]), seeds=2, own_order=False)
    outcomes = {point.name: Outcome(best, 3) for point, best in zip(points, [0.5, 0.7, None, 0.25], strict=True)}
    assert settings_scores(points, outcomes) == {"n=1": [0.5, 0.7], "n=3": [0.25]}
    seeds = points_of(place, [], {}, seeds=2, own_order=False)
    assert settings_scores(seeds, {point.name: Outcome(0.5, 3) for point in seeds}) == {"all seeds": [0.5, 0.5]}
