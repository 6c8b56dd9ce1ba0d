"""A table of tiny runs, end to end: choices, seeds, breaking off, the page; and what is refused before any run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.support import tiny_run
from train.__main__ import main
from train.commands.plan import SHAPES
from train.commands.study import write_study
from train.lab.tables.results import read_results
from train.lab.tables.table import plan_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and CoLA's files with the tiny rows under GLUE's column name."""
    folder = tiny_run.make_material(tmp_path_factory.mktemp("table"))
    (folder / "glue/cola").mkdir(parents=True)
    for source, split in (("train", "train"), ("held_out", "validation")):
        rows = (folder / f"{source}.jsonl").read_text().replace('"text"', '"sentence"')
        (folder / f"glue/cola/{split}.jsonl").write_text(rows)
    return folder


METHODS = ["lora:r=2", "melora:n=3,r=2"]


def words(material: Path, folder: Path, **changes: list[str]) -> list[str]:
    options = {
        "model": [str(material / "model")],
        "tasks": ["cola"],
        "methods": METHODS,
        "data": [str(material / "glue")],
        "seeds": ["2"],
        "rates": ["1e-3", "1e-1"],
        "held-back": ["11"],
        "folder": [str(folder)],
    } | changes
    given = [word for name, values in options.items() for word in (f"--{name}", *values)]
    small = "--train.epochs 2 --train.batch-size 8 --train.eval-batch-size 19 --data.max-length 12 --data.buckets 12"
    return ["glue", *given, "--", *small.split()]


@pytest.fixture(scope="module")
def table(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "glue"
    assert main(words(material, folder)) == 0
    return folder


def test_every_row_has_a_chosen_rate_and_a_run_a_seed(table: Path) -> None:
    results = {row.word: row for row in read_results(table)}
    assert list(results) == METHODS
    for row in results.values():
        assert list(row.last) == ["42", "43"]
        best = max(row.choices.items(), key=lambda choice: (choice[1], -float(choice[0])))[0]
        assert row.rate == float(best)
        assert row.at_edge
    assert (results["lora:r=2"].n, results["lora:r=2"].rank, results["melora:n=3,r=2"].rank) == (1, 2, 6)
    assert results["lora:r=2"].parameters == results["melora:n=3,r=2"].parameters == 2 * 2 * (12 + 12)


def test_choices_see_no_reported_row(table: Path) -> None:
    for run in (table / "cola").glob("*/*/config.toml"):
        held_back = "held_back = 11" in run.read_text()
        assert held_back == run.parent.name.startswith("rate-")


def test_the_page_says_what_the_numbers_say(table: Path) -> None:
    page, data = (table / "results.md").read_text(), json.loads((table / "results.json").read_text())
    reference = next(row for row in data if row["word"] == "lora:r=2")
    for row in data:
        scores, others = list(row["last"].values()), list(reference["last"].values())
        assert row["score"]["mean"] == pytest.approx(np.mean(scores))
        change = np.subtract(scores, others)
        half = stats.t.ppf(0.975, 1) * np.std(change, ddof=1) / np.sqrt(2)
        assert row["against_reference"]["mean"] == pytest.approx(np.mean(change))
        assert row["against_reference"]["half"] == pytest.approx(half)
        assert f"| {row['word']} |" in page
    assert "r=2, 96 parameters: from n=1 to n=3 matthews changes by" in page
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (table / name).read_bytes().startswith(b"\x89PNG")
    assert "n_at_equal_parameters.png" in page
    assert main(["study", str(table)]) == 0


def test_a_table_broken_off_goes_on(material: Path, table: Path, tmp_path: Path) -> None:
    again = shutil.copytree(table, tmp_path / "glue")
    kept = again / "cola/lora-r2/seed-42/metrics.jsonl"
    before = kept.stat().st_mtime_ns
    for name in ("seeds", "seed-42", "seed-43"):
        shutil.rmtree(again / "cola/melora-n3-r2" / name)
    (again / "results.md").unlink()
    assert "**Of the table's rows, 1 are not finished" in write_study(again).read_text()
    assert main(words(material, again)) == 0
    assert kept.stat().st_mtime_ns == before
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (table, again))
    assert second == first


def test_a_dry_run_counts_and_writes_nothing(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = words(material, tmp_path / "glue", seeds=["3"], methods=["lora:r=2", "full"])
    assert main([*given[:1], "--dry-run", *given[1:]]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"cola +lora:r=2 +96 +0 +26 .* 5 +0", shown)
    assert not (tmp_path / "glue").exists()


def test_a_dry_run_counts_roberta_base_as_the_paper_does(capsys: pytest.CaptureFixture) -> None:
    methods = ["lora:r=8", "melora:n=8,r=1", "bitfit"]
    assert (
        main(["glue", "--model", str(SHAPES / "roberta-base"), "--tasks", "rte", "--dry-run", "--methods", *methods])
        == 0
    )
    shown = capsys.readouterr().out
    for method, adapters, base in (("lora:r=8", 36_864 * 8, 0), ("melora:n=8", 36_864, 0), ("bitfit", 0, 102_144)):
        assert re.search(rf"rte +{method}\S* +{adapters:,} +{base:,} +592,130 ", shown), method


def test_a_dry_run_counts_llama_2_7b_as_the_paper_does(capsys: pytest.CaptureFixture) -> None:
    given = ["glue", "--model", str(SHAPES / "llama-2-7b"), "--tasks", "rte", "--dry-run", "--methods"]
    rest = ["--adapter.targets", "q_proj", "v_proj", "--adapter.modules-to-save", "score"]
    assert main([*given, "lora:r=1", "melora:n=8,r=2", "--", *rest]) == 0
    shown = capsys.readouterr().out
    for method, adapters in (("lora:r=1", 524_288), ("melora:n=8", 524_288 * 2)):
        assert re.search(rf"rte +{method}\S* +{adapters:,} +0 +{2 * 4096:,} ", shown), method


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["colla"]}, "unknown task 'colla'; choose all, or some of cola, cola-80, mnli,"),
        ({"tasks": ["rte"]}, "glue/rte must hold one train file"),
        ({"seeds": ["0"]}, "at least one seed"),
        ({"rates": ["1e-3", "1e-3"]}, "must be different numbers"),
        ({"rates": ["-1", "1e-3"]}, "optim.learning_rate=-1.0 must be above 0"),
        ({"held-back": ["0"]}, "data.held_back=0 must be at least 1"),
        ({"methods": ["melora:n=0"]}, "melora:n=0: "),
        ({"reference": ["full"]}, "--reference full is not one of the methods; choose from lora:r=2,"),
    ],
)
def test_bad_input_is_told_before_any_run(
    material: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict[str, list[str]], message: str
) -> None:
    assert main(words(material, tmp_path / "glue", **changes)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "glue").exists()


def test_a_warm_start_goes_by_task_and_seed(material: Path, tmp_path: Path) -> None:
    for task in ("mnli", "rte"):
        shutil.copytree(material / "glue/cola", material / "glue" / task, dirs_exist_ok=True)
    settings = {"model": str(material / "model"), "methods": ["lora:r=2"], "data": material / "glue", "rates": ()}
    settings |= {"folder": tmp_path, "seeds": (42, 43), "held_back": 5, "warm_start": True, "overrides": ()}
    mnli, cola, rte = plan_table(tasks=["rte", "mnli", "cola"][::-1], **settings)[:3]
    assert [row.task for row in (mnli, cola, rte)] == ["mnli", "cola", "rte"]
    starts = [run.train.warm_start for run in rte.reported(4e-4)]
    assert starts == [str(tmp_path / f"mnli/lora-r2/seed-{seed}/adapter") for seed in (42, 43)]
    assert cola.reported(4e-4)[0].train.warm_start is None
    assert rte.reported(1e-3)[0].optim.head_learning_rate == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="add mnli to --tasks"):
        plan_table(tasks=["rte"], **settings)
