"""Reading a run folder: the derived numbers, and an error that names the file for each malformed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.app.report.synthetic_runs import make_run, write_json
from train.report.comparison import comparison_rows
from train.run_folder.folder import read_run


def replace_events(folder: Path, *events: dict[str, Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")


def evaluation(step: int, best: bool, **metrics: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "epoch": step / 10, "loss": 1.0, **metrics, "seconds": 1.0, "best": best}


def test_the_best_is_the_latest_that_was_marked(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    scores = {10: (0.5, True), 20: (0.7, True), 30: (0.6, False)}
    replace_events(folder, *(evaluation(step, best, accuracy=score) for step, (score, best) in scores.items()))
    run = read_run(folder)
    assert run.best is not None
    assert (run.best["step"], run.best["accuracy"]) == (20, 0.7)
    assert run.last_step == 30


@pytest.mark.parametrize(
    ("setting", "metrics"),
    [
        ("", ["f1", "accuracy", "loss"]),
        ('metric = "accuracy"', ["accuracy", "f1", "loss"]),
        ('metric = "loss"', ["loss", "f1", "accuracy"]),
    ],
)
def test_the_ranking_metric_comes_first(tmp_path: Path, setting: str, metrics: list[str]) -> None:
    folder = make_run(tmp_path / "run")
    replace_events(folder, evaluation(10, True, f1=0.5, accuracy=0.6))
    with (folder / "config.toml").open("a", encoding="utf-8") as file:
        file.write(setting + "\n")
    assert read_run(folder).metrics == metrics


def test_time_per_epoch_is_elapsed_time_over_epochs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert read_run(folder).seconds_per_epoch == pytest.approx(470 * 0.35 / 2)
    replace_events(folder)
    assert read_run(folder).seconds_per_epoch is None


@pytest.mark.parametrize(
    ("n", "r", "mixer", "method"),
    [
        (8, 2, "identity", "MELoRA n=8 r=2"),
        (1, 8, "identity", "LoRA r=8"),
        (4, 8, "all", "LoRA r=8"),
        (4, 8, "shuffle", "GraLoRA n=4 r=8"),
        (0, 0, "identity", "head only"),
    ],
)
def test_a_method_has_its_usual_name(tmp_path: Path, n: int, r: int, mixer: str, method: str) -> None:
    folder = make_run(tmp_path / "run", n=n, r=r)
    config = (folder / "config.toml").read_text(encoding="utf-8")
    (folder / "config.toml").write_text(config.replace('"identity"', f'"{mixer}"'), encoding="utf-8")
    assert read_run(folder).method == method


def test_model_and_data_are_named_by_hub_id_or_file(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "files", model="/home/someone/models/MiniLM", data="/home/someone/reviews.csv"))
    assert (run.model, run.data) == ("MiniLM", "reviews.csv")
    folder = make_run(tmp_path / "hub", model="FacebookAI/roberta-base")
    config = (folder / "config.toml").read_text(encoding="utf-8")
    (folder / "config.toml").write_text(config.replace("[data]", '[data]\nname = "imdb"\nsubset = "plain"'))
    run = read_run(folder)
    assert (run.model, run.data) == ("FacebookAI/roberta-base", "imdb plain")


def test_ranks_are_measured_and_given_as_a_range(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", n=8, r=1)
    write_json(folder / "spectra.json", {"a": [1e-9, 1.0], "b": [3.0, 2.0, 1.0], "c": [1.0, 1.0]})
    run = read_run(folder)
    assert run.ranks == [1, 2, 3]
    assert run.spectra["a"].tolist() == [1.0, 1e-9]
    headers, ((label, adapter, head, ranks, rate, score, seconds),) = comparison_rows({"mine": run})
    assert headers == [
        "method",
        "adapter parameters",
        "head parameters",
        "ΔW rank",
        "learning rate",
        "held-out accuracy",
        "s/epoch",
    ]
    assert (label, adapter, head, ranks, rate, seconds) == ("mine", "9,216", "148,610", "1 to 3", "0.001", "82.2")
    assert score == f"{max(event['accuracy'] for event in run.evaluations):.4f}"


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; give the folder of a run"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.toml", "[model", r"config.toml is not TOML \(.*\); restore it"),
        ("sites.json", "{", r"sites.json is not JSON \(.*line 1 column 2"),
        ("sites.json", "[]", r"sites.json is not a JSON object"),
        ("sites.json", '{"sites": []}', r'sites.json lacks "trainable" \(int\)'),
        ("sites.json", '{"sites": [], "trainable": true}', r'sites.json lacks "trainable" \(int\)'),
        ("sites.json", "\udcff", r"sites.json is not UTF-8 text"),
        ("spectra.json", '{"a": 1}', r'spectra.json has no list of singular values at "a"'),
        ("spectra.json", '{"a": []}', r'spectra.json has no list of singular values at "a"'),
        ("spectra.json", '{"a": [1, "x"]}', r'spectra.json has no list of singular values at "a"'),
        ("spectra.json", '{"a": [1, -1]}', r'spectra.json has a singular value that is negative or not finite at "a"'),
        ("spectra.json", '{"a": [NaN]}', r'spectra.json has a singular value that is negative or not finite at "a"'),
        ("versions.json", "3", r"versions.json is not a JSON object"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "kind"), [("path", "str"), ("d_in", "int"), ("r", "list"), ("scaling", "object"), ("mixer", "str")]
)
def test_a_site_without_a_key_is_named(tmp_path: Path, key: str, kind: str) -> None:
    folder = make_run(tmp_path / "run")
    sites = json.loads((folder / "sites.json").read_text(encoding="utf-8"))
    del sites["sites"][3][key]
    write_json(folder / "sites.json", sites)
    with pytest.raises(ValueError, match=rf'sites.json lacks "{key}" \({kind}\)'):
        read_run(folder)
    write_json(folder / "sites.json", {**sites, "sites": [3]})
    with pytest.raises(ValueError, match="a site that is not a JSON object"):
        read_run(folder)
