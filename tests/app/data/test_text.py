"""Tokenising against the tokenizer called a row at a time, and the count of cut rows."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train.data import tokens as text
from train.data.tokens import load_tokenizer, tokenize

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijk"]
INPUTS = {"bert": ["input_ids", "token_type_ids", "attention_mask"], "roberta": ["input_ids", "attention_mask"]}


def make_tokenizer(folder: Path, family: str) -> str:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=INPUTS[family],
    )
    fast.save_pretrained(folder)
    return str(folder)


def sentences(seed: int, rows: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS[4:], k=chance.randrange(1, 23))) for _ in range(rows)]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("columns", [1, 2])
def test_equals_the_tokenizer_row_by_row(tmp_path, monkeypatch, family, columns):
    monkeypatch.setattr(text, "_CHUNK", 7)
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, family))
    texts = [sentences(column, 31) for column in range(columns)]
    tokens, report = tokenize(tokenizer, texts, max_length=17)
    assert (tokens.token_type_ids is not None) == (family == "bert")
    full = []
    for row, words in enumerate(zip(*texts, strict=True)):
        expected = tokenizer(*words, truncation="longest_first", max_length=17)
        assert tokens.input_ids[row].tolist() == expected["input_ids"]
        assert tokens.input_ids[row].dtype == np.int32
        if tokens.token_type_ids is not None:
            assert tokens.token_type_ids[row].tolist() == expected["token_type_ids"]
        full.append(len(" ".join(words).split()) + 1 + columns)
    assert tokens.lengths.tolist() == [min(length, 17) for length in full]
    assert (report.rows, report.truncated, report.longest) == (31, sum(length > 17 for length in full), max(full))
    assert 0 < report.truncated < 31
    assert (report.median, report.p95) == (np.percentile(full, 50), np.percentile(full, 95))


def test_the_report_says_what_was_cut(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, "bert"))
    _, report = tokenize(tokenizer, [["a b c d e f g h i j", "a"]], max_length=8)
    assert str(report) == "2 rows, tokens median 8, p95 12, longest 12; 1 cut to 8"


def test_a_length_the_model_cannot_take_is_refused(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, "bert"))
    with pytest.raises(ValueError, match=r"data\.max_length=65 is over the 64 tokens"):
        tokenize(tokenizer, [["a"]], max_length=65)


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at model\.name=") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    fast.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no padding token"):
        load_tokenizer(str(tmp_path))
