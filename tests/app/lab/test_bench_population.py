"""The bench of populations on a tiny model: the ratios are of the times shown, and its numbers are checked."""

from __future__ import annotations

import re

import jax
import pytest

from tests.support.tiny_run import SIZES, make_checkpoint
from train.__main__ import main
from train.lab.bench.population import Timed

pytestmark = pytest.mark.slow


def test_every_batch_size_has_its_row(tmp_path, capsys):
    model = make_checkpoint(tmp_path / "model", SIZES | {"vocab_size": 1000})
    before = jax.config.jax_compilation_cache_dir
    words = ["--model", str(model), "--members", "3", "--n", "3", "--length", "7", "--rounds", "2"]
    assert main(["bench-population", *words, "--batch-sizes", "2", "5", "--at-once", "2"]) == 0
    rows = re.findall(r"^ +(\d+) +2 +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ *$", said(capsys), re.M)
    assert [row[0] for row in rows] == ["2", "5"]
    assert all(float(number) > 0 for row in rows for number in row)
    assert jax.config.jax_compilation_cache_dir == before


def said(capsys) -> str:
    return capsys.readouterr().out


def test_ratios():
    timed = Timed(alone=[1.0, 2.0, 4.0], together=[2.0, 8.0, 4.0], ready_alone=10, again_alone=2, ready_together=20)
    assert timed.ratio(members=4) == 2.0
    assert timed.ratio_with_start(members=4, steps=10) == (10 + 3 * 2 + 4 * 10 * 2.0) / (20 + 10 * 4.0)


@pytest.mark.parametrize("option", ["--members", "--rounds", "--batch-sizes"])
def test_bad_numbers(option, capsys):
    assert main(["bench-population", option, "0"]) == 2
    assert "--members, --rounds and --batch-sizes must be at least 1" in capsys.readouterr().err
