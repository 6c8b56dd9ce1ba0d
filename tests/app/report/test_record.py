"""The metrics log: what is read back equals what was written, through crashes, resumes and full disks."""

from __future__ import annotations

import errno
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.run_folder.log import MetricsLog, read_metrics, replace_text

events = st.builds(
    lambda step, values: {"kind": "train", "step": step, **values},
    st.integers(0, 10**12),
    st.dictionaries(
        st.text(min_size=1).filter(lambda key: key not in ("kind", "step")),
        st.floats() | st.integers(-(2**62), 2**62) | st.booleans() | st.text(),
        max_size=5,
    ),
)


def step_events(*steps: int) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, "loss": 1.0 / step} for step in steps]


def write_events(folder: Path, events: list[dict[str, Any]], resume_step: int | None = None) -> None:
    with MetricsLog(folder, resume_step=resume_step) as log:
        for event in events:
            log.write(event)


@given(st.lists(events, max_size=5))
def test_events_are_read_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, events: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("run")
    write_events(folder, events)
    read = read_metrics(folder)
    assert [list(event) for event in read] == [list(event) for event in events]
    for event, back in zip(events, read, strict=True):
        for key, value in event.items():
            assert type(back[key]) is type(value)
            assert back[key] == value or (math.isnan(value) and str(back[key]) == "nan")


def test_the_file_is_strict_json_also_for_nan_and_infinity(tmp_path: Path) -> None:
    write_events(tmp_path, [{"kind": "train", "step": 3, "loss": math.nan, "high": math.inf, "low": -math.inf}])
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(f"bare {name}")) for line in lines]
    assert strict == [{"kind": "train", "step": 3, "loss": "NaN", "high": "Infinity", "low": "-Infinity"}]


def test_numpy_and_jax_scalars_become_python_ones(tmp_path: Path) -> None:
    scalars = {"loss": jnp.float32(0.5), "rate": np.float64(0.25), "best": np.bool_(True), "half": jnp.bfloat16(1.5)}
    write_events(tmp_path, [{"kind": "eval", "step": np.int64(7), **scalars}])
    expected = {"kind": "eval", "step": 7, "loss": 0.5, "rate": 0.25, "best": True, "half": 1.5}
    assert read_metrics(tmp_path) == [expected]
    assert [type(value) for value in read_metrics(tmp_path)[0].values()] == [str, int, float, float, bool, float]


def test_each_event_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for count, event in enumerate(step_events(1, 2, 3), start=1):
            log.write(event)
            assert len(read_metrics(tmp_path)) == count


def test_resuming_drops_the_later_steps_and_goes_on(tmp_path: Path) -> None:
    write_events(tmp_path, step_events(1, 2, 3, 4))
    write_events(tmp_path, step_events(3, 5), resume_step=2)
    assert read_metrics(tmp_path) == step_events(1, 2, 3, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_in_a_folder_without_a_log_starts_one(tmp_path: Path) -> None:
    write_events(tmp_path / "new", step_events(8), resume_step=7)
    assert read_metrics(tmp_path / "new") == step_events(8)


def test_a_new_run_does_not_touch_an_old_log(tmp_path: Path) -> None:
    write_events(tmp_path, step_events(1, 2))
    with pytest.raises(ValueError, match=r"metrics.jsonl holds the metrics of an earlier run; .*--resume"):
        MetricsLog(tmp_path)
    assert read_metrics(tmp_path) == step_events(1, 2)


def test_a_crash_at_any_byte_of_the_last_line_loses_that_event_alone(tmp_path: Path) -> None:
    write_events(tmp_path, step_events(1, 2, 3))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        kept = (1, 2, 3) if end == len(whole) - 1 else (1, 2)  # only the newline is missing: the event is whole
        assert read_metrics(tmp_path) == step_events(*kept)
    path.write_bytes(whole[:-5])
    write_events(tmp_path, step_events(3, 4), resume_step=2)
    assert read_metrics(tmp_path) == step_events(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "train", "step": 2, "loss"', "line 2 is not JSON"),
        ('{"kind": "train", "step": 2, "loss": NaN}', r'line 2 is not JSON \(bare NaN; write "NaN" with quotes\)'),
        ("[1, 2]", "line 2 is not a JSON object"),
        ('{"step": 2}', 'line 2 lacks "kind"'),
        ('{"kind": "train", "step": true}', 'line 2 lacks "step"'),
        ('{"kind": "train", "step": 2, "loss": [1]}', 'line 2 has a "loss" that is not a number'),
        ("", "line 2 is not JSON"),
        ("\udcff", "line 2 is not JSON"),
    ],
)
def test_any_other_bad_line_is_named_and_left(tmp_path: Path, line: str, message: str) -> None:
    good = '{"kind": "train", "step": 1}\n'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((good + line + "\n" + good).encode(errors="surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"metrics.jsonl {message}.*; repair or delete that line$"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=message):
        MetricsLog(tmp_path, resume_step=1)
    assert path.read_bytes() == before


def test_a_folder_without_a_log_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no metrics.jsonl in .*python -m train run"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"step": 1}, 'lacks "kind"'),
        ({"kind": "train"}, 'lacks "step"'),
        ({"kind": "train", "step": 1, "loss": np.ones(3)}, '"loss" has type ndarray; pass one number'),
        ({"kind": "train", "step": 1, "loss": None}, '"loss" has type NoneType; pass one number'),
        ({"kind": "train", "step": 1, "loss": "NaN"}, '"loss" is the text "NaN".*pass the float'),
    ],
)
def test_a_wrong_event_is_refused_whole(tmp_path: Path, event: dict[str, Any], message: str) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(step_events(1)[0])
        with pytest.raises(ValueError, match=message):
            log.write(event)
        log.write(step_events(2)[0])
    assert read_metrics(tmp_path) == step_events(1, 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(step_events(1)[0])
        real = log._file
        with Path("/dev/full").open("wb", buffering=0) as full:
            log._file = full
            with pytest.raises(OSError, match=r"while writing metrics; free space .*--resume.*metrics.jsonl") as caught:
                log.write(step_events(2)[0])
        log._file = real
    assert caught.value.errno == errno.ENOSPC
    assert read_metrics(tmp_path) == step_events(1)


def test_a_replacement_that_fails_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \udcff")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensorboard_gets_the_same_scalars(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write({"kind": "train", "step": 7, "loss": 0.5, "note": "text stays out"})
        log.write({"kind": "eval", "step": 9, "accuracy": 0.75, "best": True})
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert tensorboard_scalars(path) == {("train/loss", 7): 0.5, ("eval/accuracy", 9): 0.75, ("eval/best", 9): 1.0}


def tensorboard_scalars(path: Path) -> dict[tuple[str, int], float]:
    """The scalars of an events file, by its documented framing: length (8), crc (4), event, crc (4)."""
    event_type = importlib.import_module("tensorboardX.proto.event_pb2").Event
    data, scalars = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_type.FromString(data[12 : 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    return scalars


def test_without_tensorboardx_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'melora_jax\[tensorboard\]'"):
        MetricsLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
