"""Rows shared out to processes, which threads play: each holds its own, and batches are those of one process."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.support import tiny_run
from train.config.run_config import from_toml
from train.config.schema import DataConfig
from train.data import tokens as text
from train.data.dataset import Material, read_material
from train.data.files import bytes_of_part, find_rows, read_table
from train.data.instructions import load_instructions
from train.data.labelled import load_examples
from train.hosts.shares import Share

T = TypeVar("T")


def in_processes(count: int, work: Callable[[Share], T]) -> list[T | Exception]:
    """What `work` gives, or raises, in each of so many processes."""
    said, barrier = [""] * count, threading.Barrier(count, timeout=60)

    def run(number: int) -> T | Exception:
        def exchange(own: str) -> list[str]:
            said[number] = own
            barrier.wait()
            everyone = [*said]
            barrier.wait()
            return everyone

        try:
            return work(Share(number, count, exchange))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


RECORDS = [{"text": f"row {n} " + "é" * (n * 7 % 23), "label": str(n % 2)} for n in range(17)]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":  # with a byte-order mark, blank lines and no last line end
        lines = [json.dumps(record, ensure_ascii=False) + "\n" * (1 + n % 3) for n, record in enumerate(RECORDS)]
        path.write_text("\ufeff" + "".join(lines).rstrip("\n"), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(RECORDS))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=3)
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, RECORDS[0], delimiter="\t" if suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(RECORDS)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("processes", [1, 2, 3, 31])
def test_the_parts_of_a_file_are_its_rows_and_know_where_they_stand(tmp_path, suffix, processes):
    path = write(tmp_path, suffix)
    whole = list(find_rows(path).rows())
    assert [record for _, record in whole] == RECORDS
    parts: Any = in_processes(processes, lambda share: list(find_rows(path, share).rows()))
    assert [row for part in parts for row in part] == whole
    assert max(map(len, parts)) <= -(-len(RECORDS) // processes) + 2


def test_of_lines_no_process_reads_more_than_its_part(tmp_path):
    path = write(tmp_path, ".jsonl")
    parts = [bytes_of_part(path, Share(number, 4))[1] for number in range(4)]
    assert b"".join(parts) == path.read_bytes()
    longest = max(map(len, path.read_bytes().split(b"\n"))) + 1
    assert max(map(len, parts)) <= len(path.read_bytes()) / 4 + longest


def configured(folder: Path, kind: str) -> Any:
    """Rows with texts that are cut, empty parts, limits, packing, rows that are dropped, and held-out rows drawn."""
    if kind == "labelled":
        tiny_run.make_material(folder)
        return from_toml(tiny_run.recipe(folder, data={"max_length": 12, "buckets": [5, 9], "eval_limit": 11}))
    tiny_run.make_decoder(folder / "model")
    rows = [
        {"prompt": " ".join(["film"] * (n % 5 + 1)), "completion": " ".join(["good"] * (n % 3 + 1))} for n in range(29)
    ]
    rows[13]["prompt"] = " ".join(["plot"] * 30)  # leaves no room for its answer
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"name": str(folder / "model"), "task": "causal-lm"},
        "adapter": {"n": 1, "targets": ["q_proj"]},
    }
    sections["instruction"] = {"held_out": 6, "pack": kind == "packed"}
    data = {"train": str(folder / "train.jsonl"), "max_length": 14, "buckets": [7]}
    lines = [
        f"[{name}]" + "".join(f"\n{k} = {json.dumps(v)}" for k, v in keys.items()) for name, keys in sections.items()
    ]
    lines += ["[data]" + "".join(f"\n{k} = {json.dumps(v)}" for k, v in data.items())]
    lines += ["[train]\nbatch_size = 4\neval_batch_size = 3", f'[output]\nfolder = "{folder}/run"']
    (folder / "recipe.toml").write_text("\n".join(lines) + "\n")
    return from_toml(folder / "recipe.toml")


def all_batches(material: Material) -> list[dict[str, np.ndarray]]:
    steps = [material.plan.batch(step) for step in range(2 * material.plan.steps_per_epoch)]
    return [material.train.batch(rows) for rows in steps] + [material.validation.batch(r) for r in material.held_out]


@pytest.mark.parametrize("kind", ["labelled", "packed", "padded"])
def test_shared_out_rows_make_the_batches_of_one_process_bit_for_bit(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(text, "_CHUNK", 5)
    config = configured(tmp_path, kind)
    alone = read_material(config)
    expected = all_batches(alone)
    for processes in (2, 3):
        found: Any = in_processes(processes, lambda share: read_material(config, share))
        for material in found:
            assert (material.notes, material.most_id, material.num_labels) == (
                alone.notes,
                alone.most_id,
                alone.num_labels,
            )
            np.testing.assert_array_equal(material.train.lengths, alone.train.lengths)
        for batches in zip(expected, *map(all_batches, found), strict=True):
            whole, *parts = batches
            for name, array in whole.items():
                together = np.max([part[name] for part in parts], axis=0)
                assert together.dtype == array.dtype
                np.testing.assert_array_equal(together, array)
        for split in ("train", "validation"):
            rows = [getattr(material, split).tokens.input_ids for material in found]
            held = np.array([[ids is not None for ids in part] for part in rows])
            assert (held.sum(0) == 1).all()  # so each row is tokenised once
            if split == "train":
                assert held.sum(1).max() < 1.6 * held.sum() / processes


def failures(processes: int, work: Callable[[Share], Any]) -> list[str]:
    found = in_processes(processes, work)
    assert all(isinstance(error, ValueError) for error in found), found
    return list(map(str, found))


def test_what_is_wrong_with_one_share_stops_every_process_and_says_where(tmp_path):
    lines = [json.dumps({"text": "a", "label": n % 2}) for n in range(20)]
    path, good = tmp_path / "train.jsonl", tmp_path / "good.jsonl"
    good.write_text("\n".join(lines))
    config = DataConfig(train=str(path), validation=str(good))
    for bad, message in (
        ("{", f"{path} line 14 is not JSON"),
        (json.dumps({"text": 3, "label": 0}), f"{path} line 14: text=3 is not text"),
        (json.dumps({"text": "a", "label": None}), f"{path} line 14: label is empty"),
        (json.dumps({"text": "a"}), f"{path} line 14 has no column 'label'"),
    ):
        path.write_text("\n".join([*lines[:13], bad, *lines[13:]]))
        for said in failures(3, lambda share: load_examples(config, "classification", share)):
            assert message in said
    path.write_text("\n".join([*lines[:13], json.dumps({"text": "a", "label": 2}), *lines[13:]]))
    named = DataConfig(train=str(path), validation=str(good), label_names=("x", "y"))
    for said in failures(3, lambda share: load_examples(named, "classification", share)):
        assert f"{path} line 14: label='2' is not one of the 2 classes" in said
    talk = tmp_path / "talk.jsonl"
    talk.write_text("\n".join([json.dumps({"prompt": "a", "completion": "b" if n != 9 else ""}) for n in range(20)]))
    for said in failures(3, lambda share: load_instructions(DataConfig(train=str(talk)), held_out=3, share=share)):
        assert f"{talk} line 10: completion is an empty" in said


def test_processes_with_other_files_are_told(tmp_path):
    paths = [tmp_path / name / "rows.jsonl" for name in "ab"]
    for path, word in zip(paths, ("same", "else"), strict=True):
        path.parent.mkdir()
        path.write_text("".join(json.dumps({"text": word if n == 400 else "same"}) + "\n" for n in range(1000)))
    for said in failures(2, lambda share: read_table(paths[share.number], ["text"], share)):
        assert "of process 1 differs from that of process 0; give all hosts the same" in said
    paths[1].unlink()
    for said in failures(2, lambda share: read_table(paths[share.number], ["text"], share)):
        assert f"no file at {paths[1]}" in said
