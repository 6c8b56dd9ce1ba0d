"""Meshes of eight simulated devices against one: training, dropout masks, and what crosses `tensor`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.simulated import environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOME = ["bert:2,2,2", "bert:8,1,1", "llama:2,2,2", "llama:1,1,8", "deep:2,2,2"]
REST = [f"{family}:{sizes}" for family in ("bert", "llama") for sizes in ("1,8,1", "4,2,1", "2,1,4", "1,2,4")]
REST += ["bert:1,1,8", "llama:8,1,1"]
QUANTIZED = {"int8-bert:2,2,2": 6, "nf4-deep:1,1,8": 3 * 7 - 2 * 3}
MERGED = ["merged-bert:2,2,2", "merged-llama:2,2,2", "merged-bert:8,1,1"]
WHOLE = ["whole-bert:2,2,2", "whole-llama:2,2,2"]


def run_checks(folder: Path, *checks: str) -> dict[str, Any]:
    """The result of each check, made in a process that has eight devices."""
    paths = str(ROOT)
    own = environment(PYTHONPATH=paths)
    command = [sys.executable, "-W", "error", ROOT / "tests" / "mesh" / "mesh_main.py", folder, *checks]
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result.pop("check"): result for result in results}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_checks(
        tmp_path_factory.mktemp("mesh"),
        *SOME,
        *QUANTIZED,
        *MERGED,
        "planned:2,2,2",
        "masks:2,2,2",
        "bytes:2,2,2",
        "guard:2,2,2",
        "refusals:4,1,2",
    )


def check_equal(result: dict[str, Any]) -> None:
    """Five steps with dropout, accumulation, rows without weight and a trained head, as on one device."""
    assert result["losses"] < 1e-5
    assert result["state"] < 1e-5, result["at"]  # factors, head, and both moments of their gradients
    assert result["untouched"]
    assert result["as_stored"]


@pytest.mark.parametrize("check", SOME)
def test_a_mesh_trains_as_one_device_does(results: dict[str, Any], check: str) -> None:
    check_equal(results[check])


@pytest.mark.parametrize("check", QUANTIZED)
def test_so_it_does_on_a_quantised_base(results: dict[str, Any], check: str) -> None:
    """Tiles of nf4 that reach over the edge between two devices included."""
    assert results[check]["losses"] < 1e-5
    assert results[check]["state"] < 1e-5, results[check]["at"]
    assert results[check]["untouched"]  # nor are codes and scales other ones
    assert results[check]["cut"] == QUANTIZED[check]


@pytest.mark.parametrize("check", MERGED)
def test_so_does_the_sum_of_kernel_and_update(results: dict[str, Any], check: str) -> None:
    assert results[check]["losses"] < 1e-5
    assert results[check]["state"] < 1e-5, results[check]["at"]
    assert results[check]["untouched"]


@pytest.mark.slow
@pytest.mark.once
def test_full_fine_tuning_does_too(tmp_path: Path) -> None:
    """Losses, gradients, summed as momentum, and every parameter."""
    for result in run_checks(tmp_path, *WHOLE).values():
        assert result["losses"] < 1e-5
        assert result["state"] < 1e-5, result["at"]
        assert result["moved"] > 0.01


@pytest.mark.slow
@pytest.mark.once
def test_every_other_mesh_does_too(tmp_path: Path) -> None:
    for result in run_checks(tmp_path, *REST).values():
        check_equal(result)


def test_what_each_device_holds_is_known_beforehand(results: dict[str, Any]) -> None:
    assert results["planned:2,2,2"] == {"bert": True, "llama": True, "nf4": True}


def test_factors_and_their_moments_are_cut_over_tensor(results: dict[str, Any]) -> None:
    # A and B of query, key, value and three dense layers, each with two moments.
    assert results["bert:2,2,2"]["cut"] == 6 * 2 * 3


def test_masks_do_not_depend_on_the_mesh(results: dict[str, Any]) -> None:
    assert results["masks:2,2,2"]["equal"]
    assert 0.65 < results["masks:2,2,2"]["kept"] < 0.75


def test_the_guard_passes_our_layers_and_names_the_one_that_xla_miscompiles(results: dict[str, Any]) -> None:
    said = results["guard:2,2,2"]
    assert {said[name] for name in ("bert", "llama", "a llama that classifies")} == {"equal"}
    assert "data=2, fsdp=2, tensor=2 model/layers/0/self_attn/o_proj gives other values" in said["left to XLA"]


def test_what_does_not_fit_a_mesh_is_said(results: dict[str, Any]) -> None:
    said = results["refusals:4,1,2"]
    for key in ("batch_size", "eval_batch_size"):
        assert said[key] == (
            f"train.{key}=6 rows can't be shared out evenly to mesh.data × mesh.fsdp = 4; choose a multiple of 4"
        )
    why = "as n=3 is not a multiple of tensor=2, which mesh.whole_factors=error forbids; choose"
    assert why in said["whole_factors"]
    assert said["not in force"].endswith("not in force; call it inside `with jax.set_mesh(mesh):`")
    for key, word in (("variant", "dora"), ("variant", "adalora"), ("init", "pissa")):
        assert said[word] == (
            f"{key}='{word}' does not run on a mesh, where model/layers/0/self_attn/q_proj lies; take one device, or a "
            "plain adapter"
        )
    place = 'strategy="merged" at model/layers/0/self_attn/q_proj: its '
    whole = "kernel is cut over tensor, its minis are not, as n=3 is not a multiple of tensor=2; use"
    assert said["merged"].startswith(place + whole)
    assert said["merged int8"].startswith(f"{place}quantised kernel lies on a mesh; use")
    note = "model/layers/0/self_attn/o_proj: factors whole on each device, as n=3 is not a multiple of tensor=2"
    assert said["whole"] == note


@pytest.mark.parametrize("form", ["column", "row"])
def test_a_layers_minis_send_nothing_over_tensor(results: dict[str, Any], form: str) -> None:
    sent = results["bytes:2,2,2"][form]
    assert sent["base"] > 0
    assert sent["MELoRA n=8 r=1"] == sent["MELoRA n=8 r=8 merged"] == 0
    assert sent["LoRA r=8"] > 0  # so the count sees what is there
    assert sent["MELoRA n=8 r=1 left to XLA, packed"] > 0


def test_a_whole_steps_minis_send_their_share_of_the_gradient_norm_alone(results: dict[str, Any]) -> None:
    sent = results["bytes:2,2,2"]["step"]
    factors = 7 * 2
    assert sent["MELoRA n=8 r=1"] == 4 * factors  # one float32 each
    assert sent["LoRA r=8"] > 100 * factors
