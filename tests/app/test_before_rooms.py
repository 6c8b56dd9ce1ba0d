"""Files of every kind that an earlier version wrote (tests/fixtures/make_before_rooms.py) load, compute and resume."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file

import melora_jax as mj
from tests.support import tiny
from train.__main__ import main
from train.run_folder.log import read_metrics

pytestmark = pytest.mark.versions

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "before_rooms.tar.gz"
KINDS = ("melora", "dora", "adalora", "pissa")
IDS = np.array([[2, 5, 7, 9, 3, 0], [2, 16, 6, 8, 10, 3]], np.int32)
MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], np.int32)


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """What the earlier code computed; its files are unpacked, and theirs is the current folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return dict(np.load("expected.npz"))


def base() -> nnx.Module:
    return mj.from_pretrained("model", num_labels=2)


def logits(model: nnx.Module) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, *batch: model(*batch))(model, IDS, MASK))


def below(arrays: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_loads_bit_for_bit_and_computes_the_same(before, kind: str) -> None:
    model = base()
    mj.load_adapter(model, Path("adapters") / kind)
    tiny.assert_equal(tiny.arrays(model, nnx.Param), below(before, f"adapters/{kind}/arrays/"))
    np.testing.assert_allclose(logits(model), before[f"adapters/{kind}/logits"], rtol=0, atol=1e-6)
    again = mj.save_adapter(model, Path("again"))
    name = "melora_config.json"
    assert (again / name).read_text() == (Path("adapters") / kind / name).read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_export_loads(before, kind: str) -> None:
    model = base()
    mj.import_peft(model, Path("peft") / kind)
    np.testing.assert_allclose(logits(model), before[f"adapters/{kind}/logits"], rtol=0, atol=2e-6)


def test_an_orbax_checkpoint_loads_by_orbax_alone(before) -> None:
    tree = ocp.StandardCheckpointer().restore(Path("orbax/tree").absolute())
    expected = below(before, "adapters/melora/arrays/")
    found = {
        "/".join(map(str, path)): np.asarray(array) for path, array in nnx.traversals.flatten_mapping(tree).items()
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def assert_continued(before: dict[str, np.ndarray], run: str) -> None:
    expected = below(before, f"{run}/adapter/")
    found = load_file(Path(run) / "adapter" / "melora_adapter.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6, err_msg=name)
    losses = [event["loss"] for event in read_metrics(Path(run)) if event["kind"] == "train"]
    np.testing.assert_allclose(losses, before[f"{run}/losses"], rtol=1e-6)
    assert "<html" in (Path(run) / "report.html").read_text()


def test_a_killed_run_resumes_to_the_same_adapter(before) -> None:
    assert main(["run", "runs/interrupted/config.toml", "--resume"]) == 0
    assert_continued(before, "runs/interrupted")


def test_a_stopped_sweep_resumes_to_the_same_adapters(before) -> None:
    first = {path: path.read_bytes() for path in Path("sweep").glob("n=1*/adapter/*")}
    words = ["sweep", "sweep.toml", "--seeds", "2", "--grid", "adapter.n=1,3", "--resume"]
    assert main(words) == 0
    assert {path: path.read_bytes() for path in first} == first
    for seed in (7, 8):
        assert_continued(before, f"sweep/n=3,seed={seed}")


def test_a_finished_runs_report_is_made_again(before) -> None:
    assert main(["report", "runs/finished"]) == 0
    assert "Training report" in Path("runs/finished/report.html").read_text()
