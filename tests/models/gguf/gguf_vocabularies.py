"""Small vocabularies as GGUF files hold them, and files of a vocabulary alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.models.gguf.gguf_fixtures import gguf_writer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "Hello, world!",
    "I'll say we'RE 12345 strong in 2024.\n\n2. The second  point",
    "  leading,   inner and trailing  ",
    "tab\tand\r\nlines\n\n\n",
    "naïve café ½ ²3 ٣٤ 你好世界 🚀🏽",
    "<|im_start|>user\nhi 7<|im_end|>\n",
]
# the pieces that no merge may join, in the tokenizers of the models themselves
PIECES = {
    "gpt-2": ["I", "'ll", " say", " we", "'", "RE", " 12345Ⅷ", "\n", "\n", "2", ".", "  ", " x", "\n"],
    "smollm": ["I", "'ll", " say", " we", "'", "RE", " ", *"12345Ⅷ", "\n\n", "2", ".", "  ", " x", "\n"],
    "llama-bpe": ["I", "'ll", " say", " we", "'RE", " ", "123", "45Ⅷ", "\n\n", "2", ".", "  ", " x", "\n"],
    "qwen2": ["I", "'ll", " say", " we", "'RE", " ", *"12345Ⅷ", "\n\n", "2", ".", "  ", " x", "\n"],
}


def write_tokenizer(path: Path, fields: Mapping[str, Any], **more: Any) -> Path:
    """A file of a vocabulary alone: fields behind `tokenizer.ggml.`, and others whose dots are written `__`."""
    with gguf_writer(path, "llama") as writer:
        add_fields(writer, fields, **more)
    return path


def add_fields(writer: Any, fields: Mapping[str, Any], **more: Any) -> None:
    adders = {bool: "add_bool", int: "add_uint32", str: "add_string", list: "add_array"}
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    for key, value in (named | {key.replace("__", "."): value for key, value in more.items()}).items():
        if value is not None:
            getattr(writer, adders[type(value)])(key, value)


@cache
def byte_level(pre: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer of some 600 tokens, and its fields; trained without a cut, so that what a wrong cut does shows."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=7,
    )
    trained.train_from_iterator([*TEXTS, "".join(PIECES["smollm"])] * 2, trainer)
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<tool>"],
        "token_type": [CONTROL if token in special else NORMAL for token in tokens] + [USER_DEFINED],
        "merges": [" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
    }
    return trained, fields


@cache
def sentencepiece(adds_space: bool) -> dict[str, Any]:
    """A vocabulary of bytes, letters and some random longer pieces, each with a score of its own."""
    rng = np.random.default_rng(5)
    letters = [*"▁abcdé", "\n"]
    longer = {"".join(rng.choice(letters, rng.integers(2, 6))) for _ in range(400)} - set(letters)
    pieces = [*letters, *sorted(longer)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<u  v>"]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER_DEFINED],
        "scores": [0.0] * 259 + (-rng.permutation(len(pieces)) - 1.0).tolist() + [0.0],
        "add_space_prefix": adds_space,
    }
