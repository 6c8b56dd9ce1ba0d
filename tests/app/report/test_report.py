"""The report of one run: its numbers are the files' numbers, and nothing in a run can become markup."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from tests.app.report.markup import Page, assert_affine, assert_self_contained, drawing, lines, markers
from tests.app.report.synthetic_runs import make_run, write_json
from train.report.report import duration, write_report
from train.run_folder.log import read_metrics

EVIL = '<script>alert("1")</script>\'&amp;'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "sentiment")
    (folder / "peft").mkdir()
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def source(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_page_is_self_contained(source: str) -> None:
    assert_self_contained(source)
    assert "http://" not in source.replace("http-equiv", "")
    assert "https://" not in source


def test_the_headline_is_the_best_evaluation(run: Path, source: str) -> None:
    events = read_metrics(run)
    best = max((event for event in events if event["kind"] == "eval"), key=lambda event: event["accuracy"])
    text = Page(source).text
    assert "MELoRA n=8 r=8 all-MiniLM-L6-v2 · train.jsonl" in text
    assert f"best accuracy {best['accuracy']:.4f} step {best['step']} of 470" in text
    assert f"adapter parameters {12 * 8 * (384 + 384):,} 0.32% of the model" in text
    assert "head parameters 148,610" in text
    assert "steps 470 2 epochs" in text
    assert "time 2 min 44 s 82.2 s an epoch" in text


def test_the_loss_curves_are_the_logged_numbers(run: Path, source: str) -> None:
    events = read_metrics(run)
    steps, losses = (np.array([e[key] for e in events if e["kind"] == "train"]) for key in ("step", "loss"))
    svg = drawing(source, "Training and held-out loss")
    raw, smooth = lines(svg, 0)
    assert_affine(raw[:, 0], steps)
    scale, origin = assert_affine(raw[:, 1], losses)
    assert scale < 0  # a higher loss is higher on the page
    weights = 0.9 ** np.arange(len(losses))
    means = [np.average(losses[: k + 1], weights=weights[: k + 1][::-1]) for k in range(len(losses))]
    np.testing.assert_allclose(smooth[:, 1], scale * np.array(means) + origin, rtol=0, atol=1e-2)
    held_out = np.array([e["loss"] for e in events if e["kind"] == "eval"])
    np.testing.assert_allclose(markers(svg, 1)[:, 1], scale * held_out + origin, rtol=0, atol=1e-2)


def test_the_metric_curves_and_table_are_the_logged_numbers(run: Path, source: str) -> None:
    evaluations = [event for event in read_metrics(run) if event["kind"] == "eval"]
    svg, text = drawing(source, "Held-out metrics"), Page(source).text
    for series, name in enumerate(("accuracy", "macro_f1", "matthews")):
        values = np.array([event[name] for event in evaluations])
        assert_affine(markers(svg, series)[:, 1], values)
    for event in evaluations:
        numbers = " ".join(f"{event[name]:.4f}" for name in ("accuracy", "macro_f1", "matthews", "loss"))
        assert f"{event['step']} {event['epoch']:.2f} {numbers}" in text
        assert (f"{numbers} best" in text) == (event["step"] == 470)


def test_the_spectrum_is_logarithmic_and_marks_the_rank(run: Path, source: str) -> None:
    spectra = json.loads((run / "spectra.json").read_text(encoding="utf-8"))
    figures = re.findall(r"<figure>(.*?)</figure>", source, re.DOTALL)
    assert len(figures) == len(spectra) == 3
    for figure, (path, values) in zip(figures, spectra.items(), strict=True):
        assert f"<h3>{path}</h3>" in figure
        shares = np.array(values) / sum(values)
        assert f"rank 64 of 384, effective rank {np.exp(-np.sum(shares * np.log(shares))):.1f}" in figure
        points = markers(figure, 0)
        scale, origin = assert_affine(points[:, 0], np.arange(1.0, 65.0))
        assert_affine(points[:, 1], np.log10(values))
        (x,) = re.findall(r'd="M ([\d.]+) [\d.]+ \s*L \1 [\d.]+ \s*"[^>]*stroke-dasharray', figure)
        assert float(x) == pytest.approx(scale * 64.5 + origin, abs=1e-2)


def test_the_table_of_sites_and_the_texts_are_there(run: Path, source: str) -> None:
    page = Page(source)
    for k in range(6):
        for name in ("query", "value"):
            row = f"bert/encoder/layer/{k}/attention/self/{name} 384 384 8 8 64 6,144 2 identity packed"
            assert row in page.text
    assert "12 layers, 73,728 parameters; 22,565,376 frozen ones beside them" in page.text
    assert (run / "config.toml").read_text(encoding="utf-8").strip() in page.texts
    assert f"python -m train run {run / 'config.toml'} --resume" in page.texts
    assert f"model = peft.PeftModel.from_pretrained(base, '{run / 'peft'}')" in page.texts
    assert "jax 0.10.2" in page.text


def test_mixed_ranks_are_listed_and_equal_ones_stated_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    sites = json.loads((folder / "sites.json").read_text(encoding="utf-8"))
    sites["sites"][0] |= {"n": 4, "r": [2, 4, 6, 8], "rank": 20, "scaling": [8.0, 4.0, 8 / 3, 2.0], "parameters": 3840}
    write_json(folder / "sites.json", sites)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "self/query 384 384 4 2, 4, 6, 8 20 3,840 8, 4, 2.66667, 2 identity" in text


def test_the_same_run_gives_the_same_bytes_under_any_matplotlibrc(run: Path, source: str) -> None:
    with matplotlib.rc_context(
        {"font.size": 50.0, "axes.facecolor": "red", "xtick.direction": "in", "axes.labelsize": 30}
    ):
        write_report(run)
        assert matplotlib.rcParams["font.size"] == 50.0
    assert (run / "report.html").read_text(encoding="utf-8") == source


def test_text_from_a_run_can_not_become_markup(tmp_path: Path) -> None:
    folder = make_run(tmp_path / EVIL.replace("/", "|"), model=EVIL, data=EVIL)
    sites = json.loads((folder / "sites.json").read_text(encoding="utf-8"))
    values = json.loads((folder / "spectra.json").read_text(encoding="utf-8"))
    first = sites["sites"][1]
    values[EVIL] = values.pop(first["path"])
    first |= {"path": EVIL, "mixer": EVIL, "strategy": EVIL, "scaling": EVIL}
    write_json(folder / "sites.json", sites)
    write_json(folder / "spectra.json", values)
    write_json(folder / "versions.json", {EVIL: EVIL})
    (folder / "peft").mkdir()
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "eval", "step": 471, "epoch": 2.1, EVIL: 0.5, "best": False}) + "\n")
    source = write_report(folder).read_text(encoding="utf-8")
    assert_self_contained(source)
    assert "<script" not in source.lower()
    page = Page(source)
    assert page.text.count(EVIL) >= 11
    assert all("alert" not in value for name, value in page.attributes if name != "aria-label")


def test_a_run_without_events_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(b"")
    source = write_report(folder).read_text(encoding="utf-8")
    assert_self_contained(source)
    text = Page(source).text
    assert "best score - no evaluation yet" in text
    assert "Held-out metrics No evaluation yet." in text
    assert text.count("No training step was logged yet.") == 2


def test_a_run_before_its_first_evaluation_draws_its_loss(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    kept = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept[:1]) + "\n")
    source = write_report(folder).read_text(encoding="utf-8")
    assert "No evaluation yet." in Page(source).text
    assert "held out" not in Page(source).text


def test_a_run_of_the_head_alone_says_so(tmp_path: Path) -> None:
    text = Page(write_report(make_run(tmp_path / "run", n=0, r=0)).read_text(encoding="utf-8")).text
    assert "head only" in text
    assert "No adapter was trained." in text
    assert "None: only the 148,610 parameters of the head were trained." in text


def test_without_spectra_and_versions_the_report_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "spectra.json").unlink()
    (folder / "versions.json").unlink()
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "No spectrum was saved with this run." in text
    assert "No versions.json was saved with this run." in text


def test_losses_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, value in zip(rows, ["NaN", "Infinity", "-Infinity"], strict=False):
        row["loss"] = value
    rows[-1]["loss"] = "NaN"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = write_report(folder).read_text(encoding="utf-8")
    raw, smooth = lines(drawing(source, "Training and held-out loss"), 0)
    assert len(raw) == len(smooth) == 94 - 3


def test_a_long_log_is_thinned_to_means(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    losses = np.random.default_rng(0).uniform(size=1000)
    events = [{"kind": "train", "step": k + 1, "loss": loss} for k, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    raw, _ = lines(drawing(write_report(folder).read_text(encoding="utf-8"), "Training and held-out loss"), 0)
    means = np.append(losses[:999].reshape(-1, 3).mean(axis=1), losses[999])
    scale, _ = assert_affine(raw[:, 1], means)
    assert scale < 0


def test_a_layer_that_was_not_trained_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    paths = [site["path"] for site in json.loads((folder / "sites.json").read_text())["sites"]]
    write_json(folder / "spectra.json", {paths[0]: [0.0] * 64, paths[1]: [0.25] + [0.0] * 63, paths[2]: [0.5] * 64})
    source = write_report(folder).read_text(encoding="utf-8")
    assert "ΔW is zero: this layer was not trained" in Page(source).text
    assert "rank 1 of 384, effective rank 1.0" in Page(source).text
    assert "rank 64 of 384, effective rank 64.0" in Page(source).text


def test_of_many_spectra_six_from_first_to_last_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    paths = [site["path"] for site in json.loads((folder / "sites.json").read_text())["sites"]]
    write_json(folder / "spectra.json", {path: [1.0, 0.5] for path in paths})
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "at 6 of 12 sites" in page.text
    assert sum(tag == "figure" for tag, _ in page.tags) == 6


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "sites.json"])
def test_a_missing_file_is_named_and_the_old_report_stays(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "report.html").write_text("old")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"there is no {re.escape(name)} in "):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"


def test_the_report_is_replaced_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "report.html").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (math.e * 3600, "2 h 43 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
