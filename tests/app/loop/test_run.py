"""Runs of the application from end to end, on a tiny model: results, resuming, stopping."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from tests.support.tiny_run import make_material, recipe
from train.__main__ import main
from train.run_folder.log import read_metrics

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def place(material, tmp_path):
    shutil.copytree(material, tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture(scope="module")
def uninterrupted(material, tmp_path_factory):
    """A finished run of 14 steps, two epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "m"
    shutil.copytree(material, folder)
    assert main(["run", str(recipe(folder))]) == 0
    return folder / "run"


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_metrics(run) if event["kind"] == "train"}


def command(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "train", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").exists() and step in losses(run):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def test_a_run_leaves_what_it_promises(uninterrupted):
    names = {entry.name for entry in uninterrupted.iterdir()}
    assert {"config.toml", "metrics.jsonl", "sites.json", "checkpoints", "adapter", "peft", "report.html"} <= names
    assert list(losses(uninterrupted)) == list(range(1, 15))
    evaluations = [event for event in read_metrics(uninterrupted) if event["kind"] == "eval"]
    assert [event["step"] for event in evaluations] == [7, 14]
    assert losses(uninterrupted)[14] < losses(uninterrupted)[1]


def test_checkpoints_keep_the_latest_and_the_best(uninterrupted):
    evaluations = [event for event in read_metrics(uninterrupted) if event["kind"] == "eval"]
    best = max(evaluations, key=lambda event: event["accuracy"])["step"]
    kept = {int(entry.name) for entry in (uninterrupted / "checkpoints").iterdir() if entry.name.isdigit()}
    assert kept == {best, 14}


def test_the_saved_adapter_scores_what_the_run_says(uninterrupted):
    """The adapter on disk, put into a fresh model, gives the best evaluation's accuracy, by another road."""
    from train.config.run_config import from_toml
    from train.loop.setup import prepare

    experiment = prepare(from_toml(uninterrupted / "config.toml"))
    model = mj.from_pretrained(experiment.config.model.name, num_labels=2)
    mj.load_adapter(model, uninterrupted / "adapter")
    rows = experiment.material.validation.tokens.input_ids
    ids, mask = np.zeros((2, len(rows), 29), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    predictions = np.asarray(nnx.jit(lambda model, *batch: model(*batch))(model, ids, mask)).argmax(-1)
    best = max(event["accuracy"] for event in read_metrics(uninterrupted) if event["kind"] == "eval")
    assert np.mean(predictions == experiment.material.labels) == pytest.approx(best)
    for name in ("adapter", "peft"):
        card = (uninterrupted / name / "README.md").read_text()
        assert f"| accuracy | {best:g} |" in card
        assert "Trained on train.jsonl." in card


def test_killed_and_resumed_equals_uninterrupted(place, uninterrupted):
    """Law 11, by the app: kill -9 after a checkpoint, --resume, and every later loss is the same number."""
    run = place / "run"
    process = command("run", str(recipe(place)))
    wait_for_step(run, 9, process)
    process.kill()
    process.communicate()
    assert main(["run", str(run / "config.toml"), "--resume"]) == 0
    assert losses(run) == losses(uninterrupted)
    ours, theirs = (load_file(folder / "adapter" / "melora_adapter.safetensors") for folder in (run, uninterrupted))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(place, uninterrupted, number):
    run = place / "run"
    process = command("run", str(recipe(place)))
    wait_for_step(run, 3, process)
    os.kill(process.pid, number)
    output = process.communicate(timeout=60)[0]
    stopped = re.search(rf"stopped by {number.name} after step (\d+), which is saved; continue with: (.+)", output)
    assert stopped, output
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    said = f"{number.name}: the run stops after this step and saves; a second one ends it at once"
    assert said in output.splitlines()
    assert (run / "checkpoints" / stopped[1]).is_dir()
    words = stopped[2].split()
    assert words[:3] == ["python", "-m", "train"]
    assert main(words[3:]) == 0
    assert losses(run) == losses(uninterrupted)


def test_a_resumed_run_must_be_the_same_run(place, capsys):
    assert main(["run", str(recipe(place, train={"epochs": 1}))]) == 0
    before = (place / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["run", str(recipe(place, train={"epochs": 1, "seed": 8})), "--resume"]) == 2
    assert "train.seed is 8, but 7 in the run" in capsys.readouterr().err
    assert main(["run", str(recipe(place))]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (place / "run" / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume(place, capsys):
    assert main(["run", str(recipe(place)), "--resume"]) == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err


@pytest.mark.slow
def test_early_stop_and_max_steps(place):
    changes = {"train": {"epochs": 50, "eval_every": 2, "patience": 2}, "optim": {"learning_rate": 1e-12}}
    assert main(["run", str(recipe(place, **changes))]) == 0
    assert max(losses(place / "run")) == 6
    shutil.rmtree(place / "run")
    assert main(["run", str(recipe(place, train={"max_steps": 3}))]) == 0
    assert max(losses(place / "run")) == 3


@pytest.mark.slow
def test_accumulated_parts_equal_one_batch(place, uninterrupted):
    """Without dropout's own draws the split of a batch must not matter; rows of weight 0 included."""
    model = {"adapter": {"dropout": 0.0}}
    config = place / "model" / "config.json"
    config.write_text(config.read_text().replace('"model_type"', '"attention_probs_dropout_prob": 0.0, "model_type"'))
    found = []
    for parts in (1, 4):
        path = recipe(
            place, **model, train={"accumulate": parts, "epochs": 1}, output={"folder": str(place / f"run{parts}")}
        )
        assert main(["run", str(path)]) == 0
        found.append(losses(place / f"run{parts}"))
    np.testing.assert_allclose(list(found[0].values()), list(found[1].values()), rtol=2e-5)


def test_regression_and_bfloat16(place):
    for name in ("train.jsonl", "held_out.jsonl"):
        text = (place / name).read_text()
        (place / name).write_text(re.sub(r'"label": (\d)', r'"label": \1.5', text))
    path = recipe(place, model={"task": "regression", "dtype": "bfloat16"}, train={"epochs": 1})
    assert main(["run", str(path)]) == 0
    evaluation = next(event for event in read_metrics(place / "run") if event["kind"] == "eval")
    assert {"pearson", "spearman", "mse"} <= evaluation.keys()
    assert evaluation["mse"] == pytest.approx(evaluation["loss"], rel=1e-5)
