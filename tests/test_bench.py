"""The bench on tiny models: every variant takes its turn, and the ratios are of the medians shown."""

from __future__ import annotations

import re

import pytest
from flax import nnx
from tiny_run import DECODER_SIZES, SIZES

from melora_jax.models.build import model_from_config
from melora_jax.models.save import save_pretrained
from train.__main__ import main

SMALL = ["--batch-size", "2", "--length", "11", "--rounds", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Widths that eight minis divide, and the ids that the bench draws."""
    wide = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "vocab_size": 1009}
    folder = tmp_path_factory.mktemp("models")
    for name, sizes, task in (("classification", SIZES, "encoder"), ("causal-lm", DECODER_SIZES, "causal-lm")):
        save_pretrained(model_from_config(sizes | wide, task=task, rngs=nnx.Rngs(0)), folder / name)
    return folder


def rows(output: str) -> dict[str, list[float]]:
    found = re.findall(r"^(\S.*?)\s{2,}([\d.,]+(?:\s+(?:[\d.,]+|-))+)\s*$", output, re.MULTILINE)
    return {name: [float(cell.replace(",", "")) for cell in cells.split() if cell != "-"] for name, cells in found}


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_variants_take_turns(models, capsys, task):
    names = ["frozen limit", "LoRA r=8", "MELoRA n=8 r=1"]
    assert main(["bench", "--task", task, "--model", str(models / task), *SMALL, "--only", *names]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == names
    limit = table["frozen limit"][0]
    for median, ratio, speed, _, planned in table.values():
        assert ratio == pytest.approx(median / limit, rel=0.2, abs=0.1)  # of medians shown to a tenth of a millisecond
        assert speed == pytest.approx(2 * 11 / (median / 1e3), rel=0.2)
        assert planned >= 0


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's affair
def test_torch_takes_its_turn_and_memory_is_measured_apart(models, capsys):
    words = ["bench", "--task", "causal-lm", "--model", str(models / "causal-lm"), *SMALL, "--memory"]
    assert main([*words, "--only", "LoRA r=8", "torch+PEFT LoRA r=8"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["LoRA r=8", "torch+PEFT LoRA r=8"]
    for *_, peak in table.values():
        assert 50 < peak < 8000


def test_an_unknown_variant_is_refused(models, capsys):
    assert main(["bench", "--model", str(models / "classification"), "--only", "LoRA r=9"]) == 2
    assert "--only LoRA r=9 names no variant; there are frozen limit, LoRA r=8" in capsys.readouterr().err
