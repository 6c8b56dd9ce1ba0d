"""The card of an adapter folder: what it says, and that one which a person wrote is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import melora_jax as mj
from melora_jax.checkpoints.model_card import license_in
from tests.support import tiny


def model_of(base: Path) -> Any:
    model: Any = tiny.trained(r=[1, 2], dropout=0.1)
    model.name_or_path, model.task, model.folder = "some/base", "sequence-classification", str(base)
    return model


def test_the_card_of_our_own_format(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text('---\ntags:\n- x\nlicense: "apache-2.0"\n---\n# A base\n')
    folder = mj.save_adapter(
        model_of(tmp_path), tmp_path / "own", scores={"accuracy": 0.875, "loss": 0.4321987}, data="glue/rte"
    )
    expected = """---
base_model: some/base
library_name: melora_jax
license: apache-2.0
tags:
- melora
- lora
---
<!-- written by melora_jax; a card without this line is kept as it is -->

# MELoRA adapter for some/base

Task: sequence-classification.

Trained on glue/rte.

`melora_jax.load_adapter(model, folder)` loads it.

| setting | value |
|---|---|
| n | `2` |
| r | `[1, 2]` |
| alpha | `16.0` |
| dropout | `0.1` |
| targets | `['query', 'value']` |
| modules_to_save | `['classifier']` |

| site | shape | n | r | alpha |
|---|---|---:|---|---|
| `layer/0/query` | 6 × 10 | 2 | 1, 2 | 16 |
| `layer/0/value` | 6 × 10 | 2 | 1, 2 | 16 |
| `layer/1/query` | 6 × 10 | 2 | 1, 2 | 16 |
| `layer/1/value` | 6 × 10 | 2 | 1, 2 | 16 |

Trained whole: `classifier/bias`, `classifier/kernel`.

| score | value |
|---|---:|
| accuracy | 0.875 |
| loss | 0.432199 |
"""
    assert (folder / "README.md").read_text() == expected


def test_the_card_of_an_export_says_how_it_is_loaded(tmp_path: Path) -> None:
    card = (mj.export_peft(model_of(tmp_path), tmp_path / "peft") / "README.md").read_text()
    assert "library_name: peft" in card
    assert "license" not in card
    assert "PEFT format `lora`, rank 3: `PeftModel.from_pretrained(base, folder)` loads it." in card
    assert "score" not in card
    assert "Trained on" not in card


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    card = (mj.save_adapter(tiny.trained(), tmp_path / "own") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: melora_jax\ntags:")
    assert "# MELoRA adapter\n" in card
    assert "None" not in card


@pytest.mark.parametrize("write", [mj.save_adapter, mj.export_peft])
def test_a_card_that_a_person_wrote_is_kept_and_our_own_is_renewed(write: Any, tmp_path: Path) -> None:
    folder = write(model_of(tmp_path), tmp_path / "x")
    write(model_of(tmp_path), folder, scores={"accuracy": 0.5})
    assert "| accuracy | 0.5 |" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("# My adapter\n")
    write(model_of(tmp_path), folder)
    assert (folder / "README.md").read_text() == "# My adapter\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: 'llama3.2'\ntags: []\n---\n", "llama3.2"),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("---\n" + "[" * 100_000 + "\n---\n", None),
    ],
)
def test_the_licence_is_taken_from_the_metadata_alone(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert license_in(tmp_path) == expected
