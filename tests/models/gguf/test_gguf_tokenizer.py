"""Tokenizers from GGUF files: the ids of the tokenizer that the file was made of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import melora_jax as mj
from melora_jax.models.gguf.tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from tests.models.gguf.gguf_fixtures import write_gguf
from tests.models.gguf.gguf_vocabularies import (
    NORMAL,
    PIECES,
    TEXTS,
    add_fields,
    byte_level,
    sentencepiece,
    write_tokenizer,
)
from tests.support.decoder_fixtures import CONFIGS, random_decoder
from tests.support.models_fixtures import tensors_of


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_is_cut_as_the_file_names_and_merged_within_the_pieces(pre: str, tmp_path: Path) -> None:
    trained, fields = byte_level(pre)
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "v.gguf", fields))
    pieces = PIECES["llama-bpe" if pre.startswith("llama") else pre]
    expected = [index for piece in pieces for index in trained.encode(piece).ids]
    assert tokenizer.encode("".join(pieces), add_special_tokens=False) == expected
    assert expected != trained.encode("".join(pieces)).ids
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_only_qwen2_composes_characters_and_only_llama3_takes_whole_words_unmerged(tmp_path: Path) -> None:
    for pre in PIECES:
        _, fields = byte_level(pre)
        fields = fields | {"tokens": [*fields["tokens"], "Zebra"], "token_type": [*fields["token_type"], NORMAL]}
        tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "v.gguf", fields))
        composed = tokenizer.encode("e\u0301", add_special_tokens=False) == tokenizer.encode(
            "é", add_special_tokens=False
        )
        assert composed == (pre == "qwen2")
        assert (tokenizer.tokenize("Zebra") == ["Zebra"]) == (pre == "llama-bpe")


def test_special_tokens_and_those_of_the_user(tmp_path: Path) -> None:
    _, fields = byte_level("smollm")
    path = write_tokenizer(
        tmp_path / "v.gguf", fields, tokenizer__chat_template="{{ 1 + 1 }}", llama__context_length=77
    )
    tokenizer = tokenizer_from_gguf(path)
    names = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", None)
    user = len(fields["tokens"]) - 1
    ids = tokenizer.encode("<tool><|im_end|>", add_special_tokens=False)
    assert ids == [user, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>"
    assert tokenizer.model_max_length == 77
    assert len(tokenizer) == user + 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == "2"


@pytest.mark.parametrize(
    ("pre", "add_bos", "add_eos", "expected"),
    [
        ("smollm", None, None, ""),
        ("llama-bpe", None, None, "b"),
        ("llama-bpe", False, None, ""),
        ("qwen2", True, True, "be"),
        ("gpt-2", False, True, "e"),
    ],
)
def test_ends_are_added_as_the_file_says(
    pre: str, add_bos: bool | None, add_eos: bool | None, expected: str, tmp_path: Path
) -> None:
    _, fields = byte_level(pre)
    fields = fields | {"add_bos_token": add_bos, "add_eos_token": add_eos}
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "v.gguf", fields))
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b")]
    first, last = [1] * ("b" in expected), [2] * ("e" in expected)
    assert tokenizer.encode("a") == [*first, *plain[0], *last]
    assert tokenizer("a", "b").input_ids == [*first, *plain[0], *last, *first, *plain[1], *last]


def test_several_chat_templates(tmp_path: Path) -> None:
    _, fields = byte_level("qwen2")
    more = {"tokenizer__chat_template": "plain", "tokenizer__chat_template__tool_use": "tools"}
    tokenizer = tokenizer_from_gguf(write_tokenizer(tmp_path / "v.gguf", fields, **more))
    for name, expected in (("default", "plain"), ("tool_use", "tools")):
        assert (
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=name, tokenize=False)
            == expected
        )


def merged_by_score(text: str, fields: Mapping[str, Any]) -> list[int]:
    """SentencePiece's BPE as it is told: of all neighbours that make a token, those of the highest score are joined."""
    ids = {token: index for index, token in enumerate(fields["tokens"])}
    symbols = list(text.replace(" ", "▁"))
    while True:
        joined = [left + right for left, right in itertools.pairwise(symbols)]
        known = [place for place, token in enumerate(joined) if fields["token_type"][ids.get(token, 0)] == NORMAL]
        if not known:
            break
        best = max(known, key=lambda place: (fields["scores"][ids[joined[place]]], -place))
        symbols[best : best + 2] = [joined[best]]
    spelled = [[ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()] for symbol in symbols]
    return [index for part in spelled for index in part]


@cache
def sentencepiece_tokenizer(adds_space: bool, folder: Path) -> Any:
    return tokenizer_from_gguf(write_tokenizer(folder / f"{adds_space}.gguf", sentencepiece(adds_space)))


@pytest.mark.parametrize("adds_space", [True, False], ids=["llama", "gemma"])
@given(parts=st.lists(st.text("abcdé\n xß", min_size=1, max_size=12), max_size=3))
def test_scores_merge_as_in_sentencepiece(
    adds_space: bool, parts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    fields = sentencepiece(adds_space)
    tokenizer = sentencepiece_tokenizer(adds_space, tmp_path_factory.getbasetemp())
    expected, user = [1], len(fields["tokens"]) - 1
    for number, part in enumerate(parts):
        expected += [user] * (number > 0) + merged_by_score(" " * adds_space + part, fields)
    text = "<u  v>".join(parts)
    assert tokenizer.encode(text) == expected
    # the space that is put before each part behind a token of its own cannot be told from one that was there
    back = tokenizer.decode(expected, skip_special_tokens=True)
    assert back == ("<u  v> ".join(parts) if adds_space else text)


def test_a_sentencepiece_has_the_usual_special_tokens_unless_the_file_names_others(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "v.gguf", sentencepiece(True) | {"eos_token_id": 0, "padding_token_id": 2})
    tokenizer = tokenizer_from_gguf(path)
    assert tokenizer.special_tokens_map == {
        "bos_token": "<s>",
        "eos_token": "<unk>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "default"])
def test_a_saved_model_has_the_tokenizer_of_its_file(pre: str, tmp_path: Path) -> None:
    fields = sentencepiece(True) if pre == "default" else byte_level(pre)[1]
    changes = {"vocab_size": len(fields["tokens"])}
    write_gguf(
        tmp_path / "model.gguf",
        CONFIGS["smollm2"] | changes,
        tensors_of(random_decoder("smollm2", changes)),
        extra=lambda writer: add_fields(writer, fields),
    )
    model = mj.from_pretrained(tmp_path / "model.gguf", task="causal-lm")
    mj.save_pretrained(model, tmp_path / "saved")
    first, second = tokenizer_from_gguf(tmp_path / "model.gguf"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*TEXTS, "".join(PIECES["smollm"])]:
        assert second.encode(text) == first.encode(text)
    assert second.special_tokens_map == first.special_tokens_map
    assert mj.from_pretrained(tmp_path / "saved", task="causal-lm").config["vocab_size"] == len(fields["tokens"])


# ids by llama.cpp, which tells the digits of "\n\n2." apart from the lines before
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Three tips:\n\n1. Eat 250 g\n\n2. It's 7:45, ok?",
            [
                16705,
                5608,
                42,
                1116,
                33,
                30,
                16478,
                216,
                34,
                37,
                32,
                310,
                1116,
                34,
                30,
                657,
                506,
                216,
                39,
                42,
                36,
                37,
                28,
                10907,
                47,
            ],
        ),
        ("<|im_start|>user\n12 345<|im_end|>\n", [1, 4093, 198, 33, 34, 216, 35, 36, 37, 2, 198]),
        ("a  b   c\n\n\nd\t\te", [81, 216, 278, 256, 265, 1116, 198, 84, 197, 197, 85]),
    ],
)
def test_smollm2_has_llama_cpps_ids(text: str, expected: list[int], smollm2_file: Path) -> None:
    tokenizer = tokenizer_from_gguf(smollm2_file)
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected) == text


def test_smollm2_asks_and_ends_as_its_template_says(smollm2_file: Path) -> None:
    tokenizer = tokenizer_from_gguf(smollm2_file)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
