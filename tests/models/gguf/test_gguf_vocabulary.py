"""Vocabularies in GGUF files that are not supported or contradict themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from melora_jax.models.gguf.tokenizer import tokenizer_from_gguf
from tests.models.gguf.gguf_vocabularies import byte_level, sentencepiece, write_tokenizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert' in .* is not supported, only gpt2, llama"),
        ({"model": None}, "tokenizer.ggml.model=None in .* is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' in .* is not supported, only gpt-2, smollm, llama-bpe"),
        ({"pre": "default"}, "tokenizer.ggml.pre='default' in .* is not supported"),
        ({"pre": None}, "tokenizer.ggml.pre=None in .* is not supported"),
        ({"pre": ["smollm"]}, r"tokenizer.ggml.pre=\['smollm'\] in .* is not supported"),
        ({"tokens": None}, "tokenizer.ggml.tokens in .* is not a list of str"),
        ({"token_type": [1, 1]}, r"tokenizer.ggml.token_type in .* has 2 entries for \d+ tokens"),
        ({"merges": None}, "tokenizer.ggml.merges in .* is not a list of str"),
        ({"merges": ["a b", "Ž Ž"]}, "tokenizer.ggml.merges in .*: 'a b' does not join two tokens"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges in .*: 'ab' does not join two tokens"),
        ({"bos_token_id": 9999}, r"tokenizer.ggml.bos_token_id=9999 in .* is not one of its \d+ tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "adds a bos_token but has none"),
    ],
)
def test_other_or_contradictory_tokenizers_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, fields = byte_level("smollm")
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer_from_gguf(write_tokenizer(tmp_path / "v.gguf", fields | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "a", "x" * 1025], ids=["empty", "twice", "long"])
def test_impossible_tokens_are_refused(token: str, tmp_path: Path) -> None:
    fields = sentencepiece(True)
    tokens = [*fields["tokens"][:-1], token]
    with pytest.raises(ValueError, match="has a token twice, or one without 1 to 1024 characters"):
        tokenizer_from_gguf(write_tokenizer(tmp_path / "v.gguf", fields | {"tokens": tokens}))


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "v.gguf", byte_level("smollm")[1], tokenizer__chat_template=7)
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template in .* is not text"):
        tokenizer_from_gguf(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path / "v.gguf", byte_level("smollm")[1])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'melora_jax\[gguf\]'"):
        tokenizer_from_gguf(path)
