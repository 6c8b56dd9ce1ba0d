"""Each method by its word: a run that is broken off and resumed ends as one that was not, and keeps what it trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
import train.loop.setup
from tests.support.tiny_run import make_material, recipe
from train.__main__ import main
from train.config.run_config import from_toml
from train.data.feed import make_feed
from train.loop.setup import prepare
from train.run_folder.folder import read_run
from train.run_folder.log import read_metrics

QV = 2 * 1 * (12 + 12)  # two layers of 12 x 12, for each rank
BIASES = 4 * 12 + 12 + 19 + 12 + 12 + 12 + 12  # attention's four, a norm's, two of the feed-forward half, norms, pooler
HEAD = 12 * 2 + 2

# word → its keys, the name in tables, parameters of adapters, of the base, and what a run leaves
METHODS = {
    "melora": ({"n": 3, "r": 2}, "MELoRA n=3 r=2", 2 * QV, 0),
    "lora": ({"r": 4}, "LoRA r=4", 4 * QV, 0),
    "rslora": ({"r": 4, "init": "pissa"}, "rsLoRA r=4", 4 * QV, 0),
    "lora+": ({"r": 4}, "LoRA+ r=4", 4 * QV, 0),
    "dora": ({"r": 4}, "DoRA r=4", 4 * QV + 2 * 12, 0),
    "adalora": ({"n": 3, "r": 4}, "AdaLoRA n=3 r=4", 4 * QV + 2 * 3 * 4, 0),
    "gralora": ({"r": 4}, "GraLoRA n=2 r=4", 4 * QV, 0),
    "bitfit": ({}, "BitFit", 0, BIASES),
    "head": ({}, "head only", 0, 0),
    "full": ({}, "full fine-tuning", 0, None),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


def losses(run: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_metrics(run) if event["kind"] == "train"}


def method_recipe(folder: Path, word: str, run: str) -> str:
    path = recipe(folder, data={"max_length": 12}, train={"epochs": 1}, output={"folder": str(folder / run)})
    text = path.read_text()
    keys = {"method": word} | METHODS[word][0]
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    path.write_text(text.replace("[adapter]\nn = 3\nr = 1\ndropout = 0.1\n", f"[adapter]\n{table}"))
    return str(path)


@pytest.mark.parametrize("word", METHODS)
def test_a_method_trains_saves_resumes_and_reports(material, tmp_path, monkeypatch, word):
    folder = tmp_path / "m"
    shutil.copytree(material, folder)
    with monkeypatch.context() as patch:
        patch.setattr(train.loop.setup, "make_feed", lambda mesh: _interrupted_feed(mesh, before=4))
        assert main(["run", method_recipe(folder, word, "run")]) == 128 + signal.SIGINT
    run = folder / "run"
    assert max(losses(run)) == 4
    assert main(["run", str(run / "config.toml"), "--resume"]) == 0
    assert sorted(losses(run)) == list(range(1, 8))
    if word in ("adalora", "full"):  # what has more state than others, or other
        assert main(["run", method_recipe(folder, word, "whole")]) == 0
        assert losses(run) == losses(folder / "whole")
    _, name, adapter, base = METHODS[word]
    read = read_run(run)
    assert read.method == name
    assert (read.adapter, read.head) == (adapter, HEAD)
    assert read.base == (read.trainable - HEAD if base is None else base)
    assert (read.frozen == 0) == (word == "full")
    assert name in (run / "report.html").read_text()
    assert (run / "peft").is_dir() == bool(adapter)
    _assert_scores_as_said(run, word)


def _interrupted_feed(mesh, before):
    feed, calls = make_feed(mesh), []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == before:
            os.kill(os.getpid(), signal.SIGINT)
        return feed(*arguments)

    return wrapped


def _assert_scores_as_said(run: Path, word: str) -> None:
    """What the run left, put into a fresh model by the library alone, scores as the best evaluation says."""
    experiment = prepare(from_toml(run / "config.toml"))
    if word == "full":
        model = mj.from_pretrained(run / "model", num_labels=2)
    else:
        model = mj.from_pretrained(experiment.config.model.name, num_labels=2)
        mj.load_adapter(model, run / "adapter")
    rows = experiment.material.validation.tokens.input_ids
    ids, mask = np.zeros((2, len(rows), 12), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    logits = nnx.jit(lambda model, *batch: model(*batch))(model, ids, mask)
    probabilities = np.asarray(nnx.log_softmax(logits))[np.arange(len(rows)), experiment.material.labels]
    best = min(event["loss"] for event in read_metrics(run) if event["kind"] == "eval")
    assert -probabilities.mean() == pytest.approx(best, rel=1e-5)
