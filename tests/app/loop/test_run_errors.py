"""Bad input ends a run in one line with the remedy: exit code 2 before work starts, 1 in mid-run, never a traceback."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import melora_jax as mj
from tests.support.tiny_run import make_material, recipe
from train.__main__ import main
from train.loop.bookkeeping import Book
from train.loop.checkpoint import Checkpoints
from train.run_folder.log import read_metrics

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def place(material, tmp_path):
    shutil.copytree(material, tmp_path / "m")
    return tmp_path / "m"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unknown_key(place):
    path = recipe(place)
    path.write_text(path.read_text().replace("learning_rate", "learning_rat"))
    return path, ["unknown key optim.learning_rat", "perhaps optim.learning_rate", "recipe.toml line"]


def n_that_does_not_divide(place):
    return recipe(place, adapter={"n": 5}), ["n=5 does not divide d_in=12 at", "choose n from 1, 2, 3, 4, 6, 12"]


def target_that_matches_nothing(place):
    return recipe(place, adapter={"targets": ["querry"]}), ["'querry' matches no module", "perhaps 'query'"]


def missing_column(place):
    return recipe(place, data={"text": ["sentence"]}), ["no column 'sentence'", "columns there: text, label"]


def empty_data_set(place):
    (place / "train.jsonl").write_text("")
    return recipe(place), ["train.jsonl holds no rows"]


def label_outside_the_range(place):
    with (place / "held_out.jsonl").open("a") as file:
        file.write(json.dumps({"text": "good film", "label": 7}) + "\n")
    return recipe(place), ["held_out.jsonl line 20", "label='7'", "not one of the 2 classes"]


def truncated_safetensors(place):
    weights = place / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return recipe(place), ["model.safetensors", "again"]


def pickled_checkpoint_only(place):
    (place / "model" / "model.safetensors").unlink()
    (place / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    return recipe(place), ["pytorch_model.bin", "safetensors"]


def missing_recipe(place):
    return place / "no.toml", ["no recipe at", "local.toml"]


@pytest.mark.parametrize(
    "case",
    [
        unknown_key,
        n_that_does_not_divide,
        target_that_matches_nothing,
        missing_column,
        empty_data_set,
        label_outside_the_range,
        truncated_safetensors,
        pickled_checkpoint_only,
        missing_recipe,
    ],
)
def test_bad_input_is_one_line_and_changes_no_file(place, capsys, case):
    path, says = case(place)
    before = contents(place)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for words in says:
        assert words in error
    assert contents(place) == before


def max_length_over_the_models(place):
    return recipe(place, data={"max_length": 50}), ["data.max_length=50 is over the 37 tokens that the model takes"]


@pytest.mark.parametrize("case", [n_that_does_not_divide, target_that_matches_nothing, max_length_over_the_models])
def test_what_shapes_tell_is_found_before_data_and_weights_are_read(place, capsys, monkeypatch, case):
    def read(*_, **__):
        raise AssertionError("read")

    path, says = case(place)
    monkeypatch.setattr("train.loop.setup.read_material", read)
    monkeypatch.setattr(mj, "from_pretrained", read)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    for words in says:
        assert words in error


def test_the_command_line_prints_no_traceback(place):
    """The same through the real process: what a person sees, and the exit code."""
    path, says = n_that_does_not_divide(place)
    done = subprocess.run(
        [sys.executable, "-m", "train", "run", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert says[0] in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_unknown_command_and_no_recipe(capsys):
    assert main(["rnu"]) == 2
    assert "unknown command 'rnu'; choose run" in capsys.readouterr().err
    assert main(["run"]) == 2
    assert "which recipe?" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(place, capsys):
    """The checkpoint before it stays, and resuming meets the same error, not a silent success."""
    path = recipe(place, optim={"learning_rate": 1e30, "schedule": "constant"}, train={"eval_every": 1})
    assert main(["run", str(path)]) == 1
    error = capsys.readouterr().err
    assert "is not finite" in error
    assert "lower optim.learning_rate" in error
    assert error.count("\n") == 1
    with Checkpoints(place / "run" / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 1  # of the NaN step nothing is kept
    assert all(event["step"] <= 2 for event in read_metrics(place / "run"))


def test_a_full_disk_stops_the_run_and_keeps_the_earlier_checkpoint(place, disk, capsys, monkeypatch):
    """The disk, a small tmpfs, fills up after the first checkpoint; with room again the run goes on from there."""
    path = recipe(place, train={"eval_every": 2, "epochs": 1}, output={"folder": str(disk / "run")})
    save = Checkpoints.save

    def save_and_fill(self, *args):
        save(self, *args)
        fill(disk / "filler")

    monkeypatch.setattr(Checkpoints, "save", save_and_fill)
    assert main(["run", str(path)]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "the checkpoint of step 2 is intact; make room and continue with: python -m train run" in error
    assert error.count("\n") == 1
    (disk / "filler").unlink()
    monkeypatch.setattr(Checkpoints, "save", save)
    assert main(["run", str(disk / "run" / "config.toml"), "--resume"]) == 0
    assert [event["step"] for event in read_metrics(disk / "run") if event["kind"] == "train"] == list(range(1, 8))


@pytest.mark.parametrize("writer", ["save_adapter", "save"])
def test_a_disk_that_fills_while_saving(place, disk, capsys, monkeypatch, writer):
    """Full in the moment before the adapter, or the checkpoint, of the second evaluation is written."""
    path = recipe(place, train={"eval_every": 2, "epochs": 1}, output={"folder": str(disk / "run")})
    where = mj if writer == "save_adapter" else Book
    save, calls = getattr(where, writer), []

    def fill_and_save(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            fill(disk / "filler")
        save(*args, **options)

    monkeypatch.setattr(where, writer, fill_and_save)
    monkeypatch.setattr("train.loop.bookkeeping.is_better", lambda name, *scores: True)
    assert main(["run", str(path)]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "the checkpoint of step 2 is intact; make room and continue with: python -m train run" in error
    assert error.count("\n") == 1
    mj.load_adapter(mj.from_pretrained(place / "model", num_labels=2), disk / "run" / "adapter")


@pytest.fixture
def disk(place):
    """A file system of 2 MiB."""
    folder = place / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
