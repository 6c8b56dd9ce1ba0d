"""The comparison of runs: its numbers are the run folders' numbers, run by run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.app.report.markup import Page, assert_affine, assert_self_contained, drawing, lines, markers
from tests.app.report.synthetic_runs import make_run, write_json
from train.report.comparison import write_comparison
from train.run_folder.folder import Run, read_run

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "head only": read_run(make_run(folder / "head", n=0, r=0, score=0.75)),
        "LoRA r=8": read_run(make_run(folder / "lora", n=1, r=8, score=0.87)),
        EVIL: read_run(make_run(folder / "mini", n=8, r=1, score=0.85, learning_rate=4e-3)),
        "MELoRA n=8 r=8": read_run(make_run(folder / "melora", n=8, r=8, score=0.88)),
    }


@pytest.fixture(scope="module")
def source(runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_comparison(tmp_path_factory.mktemp("demo"), runs, title="Four methods", commands={EVIL: EVIL})
    return path.read_text(encoding="utf-8")


def test_the_page_is_self_contained_and_escapes_labels(source: str) -> None:
    assert_self_contained(source)
    assert "<script" not in source.lower()
    assert Page(source).text.count(EVIL) >= 8


def test_the_table_states_each_run(runs: dict[str, Run], source: str) -> None:
    text = Page(source).text
    rows = [("0", "-", "0.001"), ("73,728", "8", "0.001"), ("9,216", "8", "0.004"), ("73,728", "64", "0.001")]
    for (label, run), (adapter, rank, rate) in zip(runs.items(), rows, strict=True):
        best = max(event["accuracy"] for event in run.evaluations)
        assert f"{label} {adapter} 148,610 {rank} {rate} {best:.4f} 82.2" in text
    assert "held-out accuracy" in text


def test_the_curves_share_one_axis(runs: dict[str, Run], source: str) -> None:
    svg = drawing(source, "Held-out accuracy over steps")
    points = np.concatenate([markers(svg, series) for series in range(4)])
    scores = np.concatenate([[event["accuracy"] for event in run.evaluations] for run in runs.values()])
    assert_affine(points[:, 1], scores)
    losses = drawing(source, "Training loss over steps")
    for series, run in enumerate(runs.values()):
        (curve,) = lines(losses, series)
        assert_affine(curve[:, 0], np.array([event["step"] for event in run.steps]))


def test_scores_stand_over_parameters(runs: dict[str, Run], source: str) -> None:
    svg = drawing(source, "Held-out accuracy and adapter parameters")
    points = np.concatenate([markers(svg, series) for series in range(4)])
    best = [max(event["accuracy"] for event in run.evaluations) for run in runs.values()]
    assert_affine(points[:, 1], np.array(best))
    head, lora, mini, melora = points[:, 0]
    assert head < mini < lora == melora


def test_the_spectra_are_laid_over_each_other(runs: dict[str, Run], source: str) -> None:
    svg = drawing(source, "Singular values of each run's update".replace("'", "&#39;"))
    (path,) = {path for run in runs.values() for path in list(run.spectra)[:1]}
    adapted = {series: run for series, run in enumerate(runs.values()) if run.spectra}
    assert [len(markers(svg, series)) for series in adapted] == [8, 8, 64]
    points = np.concatenate([markers(svg, series) for series in adapted])
    values = np.concatenate([run.spectra[path] for run in adapted.values()])
    assert_affine(points[:, 1], np.log10(values))
    text = Page(source).text
    assert f"{EVIL}: rank 8, effective rank" in text
    assert "MELoRA n=8 r=8: rank 64, effective rank" in text
    assert "Not shown: head only has no spectrum of that layer." in text
    assert path in text


def test_more_runs_than_colours_differ_by_dashes(runs: dict[str, Run], tmp_path: Path) -> None:
    many = {f"run {k}": runs["LoRA r=8"] for k in range(8)}
    svg = drawing(write_comparison(tmp_path, many).read_text(encoding="utf-8"), "Training loss over steps")
    assert len(lines(svg, 0)) == len(lines(svg, 1)) == 2
    assert len(lines(svg, 2)) == 1
    assert svg.count("stroke-dasharray") == 2


def test_runs_without_events_are_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b"")
    (folder / "spectra.json").unlink()
    source = write_comparison(tmp_path, {"empty": read_run(folder)}).read_text(encoding="utf-8")
    assert_self_contained(source)
    text = Page(source).text
    assert text.count("No evaluation yet.") == 1
    assert "No training step was logged yet." in text
    assert "No spectrum was saved with these runs." in text
    assert "empty 73,728 148,610 - 0.001 - -" in text


def test_a_run_that_was_not_evaluated_is_named_beside_those_that_were(runs: dict[str, Run], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    both = {"started": read_run(folder), "done": runs["LoRA r=8"]}
    source = write_comparison(tmp_path, both).read_text(encoding="utf-8")
    assert "Not shown: started has no evaluation yet." in Page(source).text
    points = drawing(source, "Held-out accuracy and adapter parameters")
    assert (len(markers(points, 0)), len(markers(points, 1))) == (0, 1)


def test_runs_that_can_not_be_compared_are_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run to compare"):
        write_comparison(tmp_path, {})
    folder = make_run(tmp_path / "other")
    event = {"kind": "eval", "step": 5, "epoch": 1.0, "pearson": 0.5, "best": True}
    (folder / "metrics.jsonl").write_text(json.dumps(event) + "\n")
    with pytest.raises(
        ValueError, match=r"different metrics \(a by accuracy, b by pearson\); compare runs of one task"
    ):
        write_comparison(tmp_path, {"a": runs["LoRA r=8"], "b": read_run(folder)})
    assert not (tmp_path / "report.html").exists()


def test_updates_that_are_zero_are_not_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = json.loads((folder / "sites.json").read_text())["sites"][0]["path"]
    write_json(folder / "spectra.json", {path: [0.0] * 64})
    source = write_comparison(tmp_path, {"untrained": read_run(folder)}).read_text(encoding="utf-8")
    assert "No spectrum was saved with these runs." in Page(source).text
