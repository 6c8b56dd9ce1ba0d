"""Adapter files that are damaged or of another model: each is refused by name, and nothing is changed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import melora_jax as mj
from tests.support import disk, tiny

CONFIG, TENSORS = "melora_config.json", "melora_adapter.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mj.save_adapter(tiny.trained(r=[1, 2]), tmp_path / "adapter")


Damage = Callable[[Path], Any]


def facts_changed(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / CONFIG).read_text())
        change(facts)
        (folder / CONFIG).write_text(json.dumps(facts))

    return damage


def tensors_changed(change: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


def truncated(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-7])


QUERY = "layer/0/query"
BAD: dict[str, tuple[Damage, str]] = {
    "no config": (
        lambda folder: (folder / CONFIG).unlink(),
        f"is not an adapter folder: it has no {CONFIG}; save_adapter",
    ),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), f"is not an adapter folder: it has no {TENSORS}; save_"),
    "truncated": (truncated, "is truncated or is not a safetensors file"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text('{"format": '), f"{CONFIG} line 1 column 12: Expecting"),
    "PEFT's": (
        facts_changed(lambda facts: (facts.clear(), facts.update(peft_type="LORA"))),
        "is of format None version None, this library reads 'melora_jax' version 1; update melora_jax, or save",
    ),
    "a later version": (facts_changed(lambda facts: facts.update(version=2)), "is of format 'melora_jax' version 2,"),
    "no sites": (facts_changed(lambda facts: facts.pop("sites")), f'{CONFIG} has no object "sites"; save the adapter'),
    "a config of nothing": (facts_changed(lambda facts: facts.update(config=[])), f'{CONFIG} has no object "config"'),
    "an unknown setting": (
        facts_changed(lambda facts: facts["config"].update(target=[])),
        f"{CONFIG}: unknown key 'target' in the adapter config; perhaps 'targets'",
    ),
    "a bad setting": (facts_changed(lambda facts: facts["config"].update(n=0)), f"{CONFIG}: n=0 must be a whole"),
    "a bad site": (
        facts_changed(lambda facts: facts["sites"][QUERY].update(scaling="most")),
        f"{CONFIG}: scaling='most' is unknown; choose",
    ),
    "a site's keys": (facts_changed(lambda facts: facts["sites"][QUERY].pop("r")), f"{CONFIG}: a site is {{"),
    "a site's types": (
        facts_changed(lambda facts: facts["sites"][QUERY].update(r=1)),
        f"{CONFIG}: a site's r and alpha must be lists and its lookup true or false; save the adapter again",
    ),
    "a site and the config": (
        facts_changed(lambda facts: facts["sites"][QUERY].update(alpha=[16.0, 8.0])),
        f"contradicts itself: its config gives {QUERY} AdapterSpec(n=2,",
    ),
    "a site left out": (
        facts_changed(lambda facts: facts["sites"].pop(QUERY)),
        f"contradicts itself: its config gives {QUERY} AdapterSpec(n=2,",
    ),
    "a factor left out": (
        tensors_changed(lambda tensors: tensors.pop(f"{QUERY}/b")),
        f"{TENSORS} lacks the tensor {QUERY}/b, which {CONFIG} names; save the adapter again",
    ),
    "a head left out": (
        tensors_changed(lambda tensors: tensors.pop("classifier/bias")),
        "is for another model: classifier/bias is absent there and [3] in this model; load the base it was trained on",
    ),
    "a tensor too many": (
        tensors_changed(lambda tensors: tensors.update(stray=np.zeros(5, np.float32))),
        "is for another model: stray is [5] there and absent in this model; load the base",
    ),
    "another rank": (
        tensors_changed(lambda tensors: tensors.update({f"{QUERY}/a": np.zeros((2, 3, 4), np.float32)})),
        f"{TENSORS}: {QUERY}/a has shape [2, 3, 4], which is not n=2 minis of rank 2; save the adapter again",
    ),
    "another width": (
        tensors_changed(lambda tensors: tensors.update({f"{QUERY}/a": np.zeros((2, 5, 2), np.float32)})),
        f"is for another model: {QUERY}/a is [2, 5, 2] there and [2, 3, 2] in this model; load the base",
    ),
    "another number of labels": (
        tensors_changed(lambda tensors: tensors.update({"classifier/bias": np.zeros(4, np.float32)})),
        "is for another model: classifier/bias is [4] there and [3] in this model",
    ),
    "not a number": (
        tensors_changed(lambda tensors: tensors["classifier/bias"].fill(np.nan)),
        f"{TENSORS}: classifier/bias has values that are not finite: training diverged; use an earlier adapter",
    ),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused_and_the_model_is_as_it_was(name: str, adapted: bool, folder: Path) -> None:
    damage, message = BAD[name]
    model = tiny.trained(r=[1, 2], seed=5) if adapted else tiny.Encoder(5)
    before = tiny.snapshot(model)
    damage(folder)
    files = disk.content(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        mj.load_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    tiny.assert_as_before(model, before)
    assert disk.content(folder) == files


def test_a_model_adapted_otherwise_is_told_what_differs(folder: Path) -> None:
    model = tiny.adapted(r=[1, 2], alpha=8, targets=["query"])
    before = tiny.snapshot(model)
    expected = (
        f"the adapter in {folder} was made with alpha=16.0 (the model: 8.0), targets=('query', 'value') "
        "(the model: ('query',)); load it into melora_jax.unwrap(model)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        mj.load_adapter(model, folder)
    tiny.assert_as_before(model, before)


class Other(nnx.Module):
    """A model without the names that the adapter was made for."""

    def __init__(self) -> None:
        self.classifier = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(6, 10, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Other, "does not fit this model: targets: 'query' matches no module; the names there are: dense"),
        (lambda: tiny.Encoder(layers=1), "is for another model: layer/1/query/a is [2, 3, 2] there and absent in this"),
        (lambda: tiny.Encoder(layers=3), "is for another model: layer/2/query/a is absent there and [2, 3, 2] in this"),
    ],
)
def test_another_base_is_refused_and_left_as_it_was(make: Any, message: str, folder: Path) -> None:
    model = make()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        mj.load_adapter(model, folder)
    tiny.assert_as_before(model, before)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nowhere is not an adapter folder: it has no melora_config.json; save_"
    ):
        mj.load_adapter(tiny.Encoder(), tmp_path / "nowhere")
