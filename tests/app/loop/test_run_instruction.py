"""Instruction tuning from end to end, on a tiny decoder."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.tiny_run import make_decoder, make_instructions, recipe
from train.__main__ import main
from train.config.run_config import from_toml
from train.loop.losses import measure_text
from train.loop.setup import prepare
from train.run_folder.log import read_metrics

ADAPTER = {"n": 2, "r": 2, "targets": ["q_proj", "v_proj"], "modules_to_save": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    make_decoder(folder / "model")
    make_instructions(folder / "train.jsonl", 43)
    make_instructions(folder / "held_out.jsonl", 13, first=100)
    return folder


def chat_recipe(place: Path, folder: str, **changes) -> Path:
    sections = {"model": {"task": "causal-lm"}, "adapter": ADAPTER, "output": {"folder": str(place / folder)}}
    return recipe(place, **{name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes})


def test_packed_rows_give_the_losses_of_rows_of_their_own(place):
    """Every token's loss, each example found again by its place: packed in rows of 24 against one a row."""
    found = []
    for pack in ("pack", "no-pack"):
        config = from_toml(chat_recipe(place, "none"), [f"--instruction.{pack}"])
        experiment = prepare(config)
        material, losses = experiment.material, {}
        for step in range(material.plan.steps_per_epoch):
            rows = material.plan.batch(step)
            batch = material.train.batch(rows)
            each = np.asarray(token_losses(experiment.model, batch))
            groups = rows.rows if pack == "pack" else [(row,) if row >= 0 else () for row in rows.indices]
            for place_in_batch, group in enumerate(groups):
                start = 0
                for example in group:
                    end = start + material.train.lengths[example]
                    losses[example] = each[place_in_batch, start : end - 1]
                    start = end
        found.append(losses)
    packed, alone = found
    assert packed.keys() == alone.keys() == set(range(43))
    for example in packed:
        np.testing.assert_allclose(packed[example], alone[example], rtol=0, atol=1e-5)


def token_losses(model, batch):
    @nnx.jit
    def losses(model, batch):
        logits = model(batch["input_ids"], None, batch.get("position_ids"), batch.get("segment_ids"))
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)[..., 0]

    return np.asarray(losses(model, batch))


def test_the_measure_is_the_mean_over_answers(place):
    experiment = prepare(from_toml(chat_recipe(place, "none")))
    batch = experiment.material.train.batch(experiment.material.plan.batch(0))
    measure = measure_text(experiment.model, batch, chunk=7)
    losses = token_losses(experiment.model, batch)
    assert 0 < batch["weights"].sum() < batch["weights"].size
    np.testing.assert_allclose(measure.total, (losses * batch["weights"]).sum(), rtol=1e-5)
    assert measure.weight == batch["weights"].sum()


@pytest.mark.slow
@pytest.mark.parametrize(("pack", "stack"), [("pack", "stack-layers"), ("no-pack", "no-stack-layers")])
def test_a_run_learns_and_its_adapter_answers(place, pack, stack, capsys):
    path = chat_recipe(
        place,
        f"run-{pack}",
        model={"task": "causal-lm", "remat": "full"},
        optim={"learning_rate": 3e-2},
        train={"epochs": 3},
    )
    assert main(["run", str(path), f"--instruction.{pack}", f"--model.{stack}"]) == 0
    assert ("layers in 1 scanned run" in capsys.readouterr().out) == (stack == "stack-layers")
    run = place / f"run-{pack}"
    evaluations = [event for event in read_metrics(run) if event["kind"] == "eval"]
    assert evaluations[-1]["perplexity"] == pytest.approx(np.exp(evaluations[-1]["loss"]))
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert (run / "report.html").is_file()
    config = json.loads((run / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    capsys.readouterr()
    words = ["generate", str(place / "model"), "--adapter", str(run), "--prompt", "good film", "--max-new-tokens", "5"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


def test_loss_on_all_tokens_counts_each_but_the_first_of_its_example(place):
    config = from_toml(chat_recipe(place, "none"), ["--instruction.loss", "all"])
    material = prepare(config).material
    batches = [material.train.batch(material.plan.batch(step)) for step in range(material.plan.steps_per_epoch)]
    assert sum(batch["weights"].sum() for batch in batches) == material.train.lengths.sum() - 43


def test_rows_drawn_to_be_held_out_are_not_trained_on(place):
    config = from_toml(chat_recipe(place, "none"), ["--instruction.held-out", "9", "--data.validation", "None"])
    material = prepare(config).material
    assert (len(material.train.lengths), len(material.validation.lengths)) == (34, 9)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--data.max-length", "42"], ["data.max_length=42 is over the 41 tokens", "lower it"]),
        (["--instruction.held-out", "43", "--data.validation", "None"], ["43 rows can't be held out of the 43"]),
        (["--instruction.held-out", "3"], ["unset data.validation"]),
        (["--instruction.format", "alpaca"], ["instruction"]),
        (["--adapter.targets", "query"], ["'query' matches no module"]),
        (["--model.task", "classification"], ["no column 'text'"]),
    ],
)
def test_what_does_not_fit_is_refused_before_training(place, capsys, overrides, says):
    assert main(["run", str(chat_recipe(place, "refused")), *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in says:
        assert words in error
    assert not (place / "refused").exists()


def test_a_tokenizer_of_another_model_is_refused(place, tmp_path, capsys):
    model = make_decoder(tmp_path / "model")
    words = json.loads((model / "tokenizer.json").read_text())
    words["model"]["vocab"] = {word: number + 10 * (word == "good") for word, number in words["model"]["vocab"].items()}
    (model / "tokenizer.json").write_text(json.dumps(words))
    assert main(["run", str(chat_recipe(place, "refused")), "--model.name", str(model)]) == 2
    assert "the model's embedding has 17 rows" in capsys.readouterr().err


def test_an_empty_response_and_a_missing_template_are_refused(place, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "good film", "completion": "good"}\n{"prompt": "plot", "completion": " "}\n')
    assert main(["run", str(chat_recipe(place, "refused")), "--data.train", str(rows)]) == 2
    assert "rows.jsonl line 2" in capsys.readouterr().err
    model = make_decoder(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    assert main(["run", str(chat_recipe(place, "refused")), "--model.name", str(model)]) == 2
    assert "has no chat template; choose the alpaca template" in capsys.readouterr().err
