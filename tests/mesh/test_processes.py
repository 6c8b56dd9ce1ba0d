"""Runs on many processes and meshes of simulated devices against the run on one: the same, killed and resumed."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_run
from tests.support.simulated import environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = {"n": 2, "r": 1, "dropout": 0.1, "targets": ["query", "value", "output.dense"]}
TRAIN = {"epochs": 4, "batch_size": 8, "accumulate": 2, "eval_batch_size": 8, "log_every": 1, "seed": 7}
TWO = {"mesh.data": 2, "mesh.tensor": 2}
_STARTED: list[Any] = []
EIGHT = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 steps of a BERT that two devices can share: two heads, an even inner size."""
    sizes = tiny_run.SIZES | {"num_attention_heads": 2, "intermediate_size": 20, "hidden_dropout_prob": 0.1}
    folder = tiny_run.make_material(tmp_path_factory.mktemp("processes"), sizes)
    return tiny_run.recipe(folder, adapter=ADAPTER, train=TRAIN, data={"buckets": [24]})


@pytest.fixture(scope="module")
def alone(recipe: Path) -> list[Any]:
    """What the run on one device logged."""
    [process] = start(recipe, "alone")
    assert ended(process)[0] == 0
    return events(recipe, "alone")


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    for process in _STARTED:
        process.kill()
        process.communicate()
    _STARTED.clear()


def start(recipe: Path, name: str, *words: str, devices: int = 1, processes: int = 1, **options: Any) -> list[Any]:
    """Starts a run, of as many processes, in the folder `name`; each sees so many devices.

    A list among the options has one value for each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for process in range(processes):
        hosts = {"coordinator": f"localhost:{port}", "processes": processes, "process": process}
        own = {key: value[process] if isinstance(value, list) else value for key, value in options.items()}
        own |= {f"distributed.{key}": value for key, value in hosts.items()} if processes > 1 else {}
        named = [word for key, value in own.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "train", "run", recipe, "--output.folder", recipe.parent / name]
        started.append(
            subprocess.Popen(
                [*map(str, command), *named, *words],
                cwd=ROOT,
                env=environment(devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    _STARTED.extend(started)
    return started


def ended(process: Any, timeout: float = 300) -> tuple[int, str]:
    """A process's exit code and output."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def events(recipe: Path, name: str) -> list[Any]:
    lines = (recipe.parent / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wait_for_step(recipe: Path, name: str, step: int, not_in: int | None = None) -> None:
    """Waits until a step is logged, in a log that is not the file `not_in`: a resumed run writes a new one."""
    log, until = recipe.parent / name / "metrics.jsonl", time.monotonic() + 200
    while not log.exists() or log.stat().st_ino == not_in or f'"step": {step},' not in log.read_text(encoding="utf-8"):
        assert time.monotonic() < until, "the run has not come so far"
        time.sleep(0.05)


def check_same(found: list[Any], expected: list[Any]) -> None:
    """The same steps and evaluations, to rounding."""
    assert [(event["kind"], event["step"]) for event in found] == [(e["kind"], e["step"]) for e in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in {"loss", "grad_norm", "accuracy", "learning_rate"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours, theirs)


def test_a_killed_host_ends_the_other_which_goes_on_alone_as_if_nothing_had_been(
    recipe: Path, alone: list[Any]
) -> None:
    both = start(recipe, "two", devices=2, processes=2, **TWO)
    wait_for_step(recipe, "two", 9)  # past the first evaluation, after which there is a checkpoint
    both[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    code, output = ended(both[0])
    assert time.monotonic() - killed < 60
    assert code != 0
    assert "config.toml --resume" in output, output
    ended(both[1])
    [process] = start(recipe, "two", "--resume")
    code, output = ended(process)
    assert code == 0, output
    check_same(events(recipe, "two"), alone)


def test_hosts_with_different_recipes_are_told_so(recipe: Path) -> None:
    both = start(recipe, "unequal", processes=2, **{"mesh.data": 2, "optim.learning_rate": [1e-3, 2e-3]})
    for process in both:
        code, output = ended(process, timeout=100)
        assert code == 2
        assert "[optim] of process 1 differs from that of process 0" in output
    assert not (recipe.parent / "unequal").exists()


@pytest.mark.slow
@pytest.mark.once
def test_any_mesh_goes_on_with_another_ones_checkpoint(recipe: Path, alone: list[Any]) -> None:
    [process] = start(recipe, "passed on", devices=8, **EIGHT)
    wait_for_step(recipe, "passed on", 8)
    process.send_signal(signal.SIGKILL)
    ended(process)
    log = (recipe.parent / "passed on" / "metrics.jsonl").stat().st_ino
    four = start(recipe, "passed on", "--resume", processes=4, **{"mesh.data": 2, "mesh.tensor": 2})
    wait_for_step(recipe, "passed on", 10, not_in=log)
    four[2].send_signal(signal.SIGTERM)  # to one: all stop after the same step
    codes, outputs = zip(*map(ended, four), strict=True)
    assert codes == (128 + signal.SIGTERM,) * 4, outputs
    assert "stopped by SIGTERM after step" in outputs[0]
    [process] = start(recipe, "passed on", "--resume", devices=8, **{"mesh.fsdp": 4, "mesh.tensor": 2})
    code, output = ended(process)
    assert code == 0, output
    check_same(events(recipe, "passed on"), alone)
