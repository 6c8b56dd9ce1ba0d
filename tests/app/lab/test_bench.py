"""The bench on tiny models: each variant takes its turn, ratios are of the same rounds, the page shows the file."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.models.auto import model_from_config
from melora_jax.models.hub.save import save_pretrained
from tests.support.tiny_run import DECODER_SIZES, SIZES
from train.__main__ import main
from train.lab.bench import bench
from train.lab.bench.compile import compile_rows
from train.lab.bench.flops import forward_flops
from train.lab.bench.record import Record, Row, load
from train.lab.bench.steps import Bench, Facts, Step, variants

pytestmark = pytest.mark.slow

SMALL = ["--batch-size", "2", "--length", "11", "--rounds", "3"]
NAMES = ["frozen limit", "LoRA r=8", "MELoRA n=8 r=8"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Widths that eight minis divide, and the ids that the bench draws."""
    wide = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "vocab_size": 1009}
    folder = tmp_path_factory.mktemp("models")
    for name, sizes, task in (("classification", SIZES, "encoder"), ("causal-lm", DECODER_SIZES, "causal-lm")):
        save_pretrained(model_from_config(sizes | wide, task=task, rngs=nnx.Rngs(0)), folder / name)
    return folder


def result(words: list[str], out: Path) -> Any:
    assert main(["bench", *words, "--out", str(out)]) == 0
    return load(out)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_variants_take_turns(models, capsys, tmp_path, task):
    run = result(["--task", task, "--model", str(models / task), *SMALL, "--only", *NAMES], tmp_path / "x.json")
    (record,) = run.records
    assert [row.name for row in record.rows] == NAMES
    assert all(len(row.seconds) == 3 for row in record.rows)
    limit, lora, melora = record.rows
    assert record.ratio(limit) == 1
    assert melora.facts["trainable"] == lora.facts["trainable"] > limit.facts["trainable"]
    assert limit.facts["flops"] == lora.facts["flops"] > 0
    assert all(row.facts["planned_bytes"] > 0 and row.facts["hlo_lines"] > 100 for row in record.rows)
    assert melora.facts["strategy"] == "batched"  # so few tokens
    assert lora.facts["strategy"] == "packed"
    shown = capsys.readouterr().out
    for row in record.rows:
        cells = re.search(rf"^{re.escape(row.name)}[^\d-]*?\s{{2,}}(.*)$", shown, re.MULTILINE)[1].split()
        assert cells[:3] == [
            f"{1e3 * statistics.median(row.seconds):.1f}",
            f"{record.ratio(row):.3f}",
            f"{22 / statistics.median(row.seconds):,.0f}",
        ]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("task", "layers", "others"), [("classification", 6, 1), ("causal-lm", 7, 0)])
def test_all_linear_leaves_out_the_head(models, task, layers, others):
    """Others: BERT's pooler."""
    bench = Bench(str(models / task), task, 2, 11, ("all-linear",), "float32")
    step = variants(bench, [(8, 1)])["MELoRA n=8 r=1"]()
    model = bench.load()
    depth = len(model.bert.encoder.layer if task == "classification" else model.model.layers)
    adaptation = mj.adapt(
        model, mj.MELoRAConfig(n=8, r=1, targets=r".*(query|key|value|dense|_proj)"), rngs=nnx.Rngs(0)
    )
    assert len(adaptation.sites) == depth * layers + others
    assert step.facts.trainable == adaptation.adapter


def test_a_turn_is_of_several_steps_and_its_time_is_of_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def step(seconds):
        return Step(lambda: clock.append(clock.pop() + seconds), Facts())

    steps = {"first": step(2.0), "other": step(3.0)}
    assert bench._turns(steps, rounds=2, turn=4) == {"first": [2.0, 2.0], "other": [3.0, 3.0]}
    assert clock == [2 * 4 * (2.0 + 3.0)]


def test_ratios_are_of_the_same_round():
    """A machine that is slow in one round is so for all: the ratio is not the ratio of the medians."""
    rows = [Row("first", [1.0, 2.0, 9.0], {}), Row("other", [1.5, 2.2, 9.9], {})]
    assert Record({}, rows).ratio(rows[1]) == pytest.approx(1.1)


def test_the_models_arithmetic_is_that_of_its_products(models):
    """Counted by hand: the layers' kernels once a token, attention twice, pooler and head once a row."""
    model = mj.from_pretrained(models / "classification", task="sequence-classification", num_labels=2)
    rows, length, size, inner = 2, 11, 24, 40
    layers = len(model.bert.encoder.layer)
    kernels = layers * (4 * size * size + 2 * size * inner) * rows * length
    attention = layers * 2 * rows * length * length * size
    heads = rows * (size * size + size * 2)
    graphdef, state = nnx.split(model)
    ids, mask = np.ones((rows, length), np.int32), np.ones((rows, length), np.int32)
    found = forward_flops(lambda state: nnx.merge(graphdef, state)(ids, mask), state)
    assert found == 2 * (kernels + attention + heads)


def test_a_scan_counts_each_of_its_turns():
    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, length=5)[0]

    assert forward_flops(scanned, np.ones((3, 3), np.float32)) == 5 * 2 * 27


def test_a_sweep_is_every_combination(tmp_path):
    words = [
        "--sweep",
        "n=1,2",
        "r=3",
        "width=64,128",
        "depth=1",
        "--batch-size",
        "2",
        "--length",
        "7",
        "--rounds",
        "1",
    ]
    run = result(words, tmp_path / "x.json")
    assert [(record.subject["width"], record.subject["depth"]) for record in run.records] == [(64, 1), (128, 1)]
    assert all(
        [row.name for row in record.rows] == ["frozen limit", "LoRA r=3", "MELoRA n=2 r=3"] for record in run.records
    )
    adapters = [2 * 3 * (width + width) for width in (64, 128)]  # query and value of one layer
    limits = [record.rows[0].facts["trainable"] for record in run.records]
    assert limits == [2 * 64, 2 * 128]
    assert [record.rows[2].facts["trainable"] for record in run.records] == adapters


def test_every_variant_trains(models):
    """Full fine-tuning deletes what it is given, and the others share their base: each must have arrays of its own."""
    folder = str(models / "classification")
    steps = variants(Bench(folder, "classification", 2, 7, ("query", "value"), "float32"), [(8, 8)])
    ready = {name: make() for name, make in steps.items() if not name.startswith("torch")}
    assert list(ready)[-1] == "full fine-tuning"
    for _ in range(2):
        for step in reversed(ready.values()):
            step.advance()
    assert ready["full fine-tuning"].facts.flops == 1.5 * ready["frozen limit"].facts.flops


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's affair
def test_torch_takes_its_turn_and_memory_is_measured_apart(models, tmp_path):
    words = ["--task", "causal-lm", "--model", str(models / "causal-lm"), *SMALL, "--memory"]
    run = result([*words, "--only", "LoRA r=8", "torch+PEFT LoRA r=8"], tmp_path / "x.json")
    rows = run.records[0].rows
    assert [row.name for row in rows] == ["LoRA r=8", "torch+PEFT LoRA r=8"]
    assert all(50e6 < row.peak_bytes < 8e9 for row in rows)


def test_stacked_layers_compile_to_the_same_size_at_any_depth():
    sizes = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 40}
    said = []
    rows = compile_rows((2, 4), said.append, sizes | {"num_attention_heads": 2, "max_position_embeddings": 512})
    lines = {(row["depth"], row["stacked"]): row["hlo_lines"] for row in rows}
    assert lines[2, True] == pytest.approx(lines[4, True], rel=0.02)
    assert lines[4, False] > 1.5 * lines[2, False]
    assert said[0] == "compiling 2 layers, stacked ..."


def test_a_page_is_filled_from_its_results_and_keeps_its_prose(models, tmp_path, capsys):
    words = ["--model", str(models / "classification"), *SMALL, "--only", *NAMES, "--title", "Tiny"]
    run = result(words, tmp_path / "speed" / "tiny.json")
    page = tmp_path / "speed.md"
    page.write_text("Before.\n\n<!-- bench tiny.json -->\nold\n<!-- end -->\n\nAfter.\n")
    command = ["bench", "--page", str(page), "--results", str(tmp_path / "speed")]
    for _ in range(2):  # a page that is filled again stays the same
        assert main(command) == 0
        text = page.read_text()
        assert text.startswith("Before.\n\n<!-- bench tiny.json -->\n")
        assert text.endswith("<!-- end -->\n\nAfter.\n")
        assert "old" not in text
        assert text.count("### Tiny") == text.count("![Tiny](speed/tiny.png)") == 1
        assert f"jax {jax.__version__}" in text
        assert run.machine["date"] in text
        line = next(line for line in text.splitlines() if line.startswith("| MELoRA n=8 r=8 (batched)"))
        assert f"| {run.records[0].ratio(run.records[0].rows[2]):.3f} |" in line
    page.write_text("<!-- bench other.json -->\n<!-- end -->\n")
    assert main(command) == 2
    assert "names other.json, which is not in" in capsys.readouterr().err
    assert page.read_text() == "<!-- bench other.json -->\n<!-- end -->\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "LoRA r=9"], "--only LoRA r=9 names no variant; there are frozen limit, LoRA r=1"),
        (
            ["--sweep", "m=1"],
            "--sweep m=1: 'm' is not a quantity; choose from n, r, tokens, width, depth, such as n=1,2,4",
        ),
        (["--sweep", "n=1,x"], "--sweep n=1,x: '1,x' is not a list of whole numbers from 1, such as 1,2,4"),
        (["--sweep", "n=0"], "--sweep n=0: '0' is not a list of whole numbers from 1"),
        (["--sweep", "tokens=100"], "--sweep tokens: 100 is not a multiple of --length 64"),
        (["--sweep", "n=2", "--memory"], "--memory is of the variants of one model; leave --sweep out"),
        (["--page", "nowhere.md"], "nowhere.md"),
        (["--turn", "0"], "--rounds 9 and --turn 0 must be at least 1"),
    ],
)
def test_bad_options_are_refused(models, capsys, words, message):
    assert main(["bench", "--model", str(models / "classification"), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_result_is_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"title": "x"}))
    (tmp_path / "p.md").write_text("<!-- bench x.json -->\n<!-- end -->\n")
    assert main(["bench", "--page", str(tmp_path / "p.md"), "--results", str(tmp_path)]) == 2
    assert "x.json is not a result of the bench" in " ".join(capsys.readouterr().err.split())
