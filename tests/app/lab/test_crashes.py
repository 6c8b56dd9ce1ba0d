"""Runs that are killed or stopped at bad moments: what is left behind, and that they end as if nothing had been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import melora_jax as mj
import train.loop.loop
from melora_jax.files import atomic
from melora_jax.files.atomic import atomic_folder
from melora_jax.files.safetensors_io import TensorFile
from tests.support.tiny_run import make_material, recipe
from train.__main__ import main
from train.hosts.interrupt import Interrupt
from train.lab.crash.ends import differences
from train.loop.checkpoint import Checkpoints, MemberNotes, Notes
from train.run_folder.leftovers import clear_leftovers, leftovers

QUICK = {"data": {"buckets": [24]}, "train": {"eval_every": 5}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def finished(place):
    """A run that was left alone: 14 steps, evaluated at 5, 10 and 14."""
    assert main(["run", str(recipe(place, **QUICK, output={"folder": str(place / "finished")}))]) == 0
    return place / "finished"


def words(place, name: str) -> list[str]:
    return ["run", str(recipe(place, **QUICK, output={"folder": str(place / name)}))]


@pytest.mark.slow
def test_killed_runs_end_as_the_one_left_alone(place, capsys):
    path = recipe(place, **QUICK, output={"folder": str(place / "crashes")})
    assert main(["crash-test", str(path), "--kills", "2", "--train.epochs", "1"]) == 0
    assert "2 of 2 killed runs resumed and ended bit-identical" in capsys.readouterr().out
    assert {entry.name for entry in (place / "crashes").iterdir()} == {
        "uninterrupted",
        "uninterrupted.toml",
        "uninterrupted.log",
    }
    assert main(["crash-test", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_end_that_differs_is_seen(finished, tmp_path):
    assert differences(finished, finished) == []
    weights = "adapter/melora_adapter.safetensors"
    changes = {f"{weights} differs": _change_last_bit(weights), "metrics.jsonl differs": _change_loss}
    changes["leftover .adapter.0f.tmp"] = lambda run: (run / ".adapter.0f.tmp").mkdir()
    changes["peft/notes.md exists in only one of the two"] = lambda run: (run / "peft/notes.md").write_text("")
    changes[r"there are checkpoints of steps \[14\], not .*"] = _keep_last
    for found, change in changes.items():
        run = tmp_path / "run"
        shutil.copytree(finished, run)
        change(run)
        (difference,) = differences(run, finished)
        assert re.fullmatch(found, difference)
        shutil.rmtree(run)


def _change_last_bit(name):
    def change(run):
        tensors = load_file(run / name)
        first = sorted(tensors)[0]
        tensors[first] = np.nextafter(tensors[first], np.float32(9))
        metadata = TensorFile(run / name).metadata
        save_file(tensors, run / name, metadata)

    return change


def _change_loss(run):
    *lines, last = (run / "metrics.jsonl").read_text().splitlines()
    event = json.loads(last) | {"loss": np.nextafter(json.loads(last)["loss"], 9)}
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(event)]) + "\n")


def _keep_last(run):
    for entry in (run / "checkpoints").iterdir():
        if entry.name.isdigit() and entry.name != "14":
            shutil.rmtree(entry)


def test_a_run_killed_before_its_first_checkpoint_begins_again(place, finished, capsys):
    run = place / "early"
    shutil.copytree(finished, run)
    for entry in (run / "checkpoints").iterdir():
        shutil.rmtree(entry)
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("finished", "early"))
    assert main([*words(place, "early"), "--train.seed", "8", "--resume"]) == 2
    assert "train.seed is 8, but 7 in the run" in capsys.readouterr().err
    assert main([*words(place, "early"), "--resume"]) == 0
    assert differences(run, finished) == []


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 14])
def test_a_signal_breaks_off_an_evaluation_which_the_resumed_run_makes(place, finished, monkeypatch, capsys, at):
    """The grace time of a preempted machine may be shorter than an evaluation."""
    evaluate = train.loop.loop.measure_held_out

    def interrupted(cohort, *rest):
        if int(cohort.state.step) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(cohort, *rest)

    run = words(place, f"stopped-{at}")
    with monkeypatch.context() as patched:
        patched.setattr(train.loop.loop, "measure_held_out", interrupted)
        assert main(run) == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step {at}, which is saved" in capsys.readouterr().out
    assert main([*run, "--resume"]) == 0
    assert differences(place / f"stopped-{at}", finished) == []


def test_a_second_signal_is_not_held_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal() == signal.SIGTERM
        # The next one ends the process as it would have before.
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_leftovers_of_the_librarys_writes_are_cleared(tmp_path, monkeypatch):
    """What a kill leaves, made by writes that cannot clean up behind them."""
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "adapter") as folder:
            (folder / "file").write_text(text)
    with pytest.raises(OSError, match="died"), atomic_folder(tmp_path / "adapter") as folder:
        raise OSError("died")
    monkeypatch.undo()
    assert sorted(path.suffix for path in leftovers(tmp_path)) == [".old", ".tmp"]
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter/file").read_text() == "new"


def test_an_old_content_without_successor_is_put_back(tmp_path):
    (tmp_path / ".adapter.0123.old").mkdir()
    (tmp_path / ".config.toml.77.tmp").write_text("")
    (tmp_path / ".hidden").write_text("the user's own")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "adapter"]


def test_the_best_checkpoint_is_known_after_reopening(tmp_path):
    def save(step: int, best: int) -> None:
        state = mj.TrainState(jnp.int32(step), nnx.State({}), {"x": jnp.zeros(())}, nnx.State({}))
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state, Notes([MemberNotes(config="", best_step=best)]), best)

    for step, best in enumerate((1, 2, 2, 2), start=1):
        save(step, best)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 4]


def test_the_newest_checkpoint_becomes_the_best_one_once_it_is_evaluated(tmp_path):
    def save(step: int, unevaluated: bool = False, **notes: Any) -> None:
        state = mj.TrainState(jnp.int32(step), nnx.State({}), {"x": jnp.zeros(())}, nnx.State({}))
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(
                state, Notes([MemberNotes(config="", **notes)], unevaluated=unevaluated), notes["best_step"]
            )

    save(1, best_step=1)
    save(2, best_step=1, unevaluated=True)  # broken off
    save(2, best=0.5, best_step=2)  # the resumed run
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2]
        assert checkpoints.notes() == Notes([MemberNotes(config="", best=0.5, best_step=2)])
    save(3, best_step=2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [2, 3]
