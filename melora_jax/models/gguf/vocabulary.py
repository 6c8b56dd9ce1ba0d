"""The vocabulary in a GGUF file, checked: every later step may believe it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from melora_jax.models.gguf.reader import GGUFFile

MODELS = ("gpt2", "llama")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("gpt-2", "smollm", *LLAMA3, "qwen2")
# every way to cut a token in two is looked at, so a token of megabytes would take hours
_LONGEST = 1024
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Token(enum.IntEnum):
    """The types of token that are not simply merged, by their numbers in `tokenizer.ggml.token_type`."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file tells of its tokenizer, checked.

    Attributes:
      where: the file, for errors.
      model: `tokenizer.ggml.model`, one of MODELS.
      pre: `tokenizer.ggml.pre`, of gpt2 one of PRE_TOKENIZERS.
      tokens: the text of each token.
      types: the `Token` type of each.
      scores: the score of each, of a llama; empty for gpt2.
      merges: pairs of tokens that make a token, the first merged first, of a gpt2; empty for llama.
      special: transformers' names of special tokens, and their texts.
      adds: whether a text gets the beginning's token and the end's.
      adds_space: whether a text gets a space before its first word (llama).
      max_length: the model's context length; None where it is not said.
      chat_template: the Jinja template of a conversation, or several by name.
    """

    where: str
    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    special: dict[str, str]
    adds: tuple[bool, bool]
    adds_space: bool
    max_length: int | None
    chat_template: str | dict[str, str] | None

    def ids(self) -> dict[str, int]:
        """The number of each token."""
        return {token: index for index, token in enumerate(self.tokens)}


def vocabulary_from_gguf(file: GGUFFile) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Raises:
      ValueError: the file has no tokenizer, one of an unsupported kind, or lists that contradict each other.
    """
    fields, where = file.fields, str(file.path)
    known = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    model, pre = known.get("model"), known.get("pre")
    if not isinstance(model, str) or model not in MODELS:
        raise ValueError(
            f"tokenizer.ggml.model={model!r:.99} in {where} is not supported, only {', '.join(MODELS)}; take the"
            " tokenizer from the checkpoint that the file was made of"
        )
    if model == "gpt2" and (not isinstance(pre, str) or pre not in PRE_TOKENIZERS):
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r:.99} in {where} is not supported, only {', '.join(PRE_TOKENIZERS)}; how it"
            " cuts text is not known here, so take the tokenizer from the checkpoint that the file was made of"
        )
    context = fields.get(f"{fields.get('general.architecture')}.context_length")
    tokens = _list(known, "tokens", str, where)
    if len(set(tokens)) != len(tokens) or not all(0 < len(token) <= _LONGEST for token in tokens):
        raise ValueError(
            f"tokenizer.ggml.tokens in {where} has one twice, or one of not 1 to {_LONGEST} characters; fetch it again"
        )
    defaults = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} if model == "llama" else {}
    adds_bos = known.get("add_bos_token", model == "llama" or pre in LLAMA3)
    return Vocabulary(
        where=where,
        model=model,
        pre=pre,
        tokens=tokens,
        types=_list(known, "token_type", int, where, len(tokens)),
        scores=_list(known, "scores", float, where, len(tokens)) if model == "llama" else [],
        merges=_merges(known, set(tokens), where) if model == "gpt2" else [],
        special=_special(defaults | known, tokens, where),
        adds=(bool(adds_bos), bool(known.get("add_eos_token", False))),
        adds_space=bool(known.get("add_space_prefix", True)),
        max_length=context if type(context) is int else None,
        chat_template=_chat_template(fields, where),
    )


def _list(known: Mapping[str, Any], key: str, kind: type, where: str, length: int | None = None) -> list[Any]:
    values = known.get(key)
    if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
        raise ValueError(f"tokenizer.ggml.{key} in {where} is no list of {kind.__name__}; fetch the file again")
    if length not in (None, len(values)):
        raise ValueError(
            f"tokenizer.ggml.{key} in {where} has {len(values)} entries for {length} tokens; fetch it again"
        )
    return values


def _merges(known: Mapping[str, Any], tokens: set[str], where: str) -> list[tuple[str, str]]:
    merges = []
    for merge in _list(known, "merges", str, where):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= tokens:
            raise ValueError(f"tokenizer.ggml.merges in {where}: {merge!r:.99} is not of tokens; fetch the file again")
        merges.append((left, right))
    return merges


def _special(known: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    named = {}
    for name, key in _SPECIAL.items():
        index = known.get(f"{key}_token_id")
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise ValueError(
                    f"tokenizer.ggml.{key}_token_id={index!r:.99} in {where} is none of its {len(tokens)} tokens;"
                    " fetch the file again"
                )
            named[name] = tokens[index]
    return named


def _chat_template(fields: Mapping[str, Any], where: str) -> str | dict[str, str] | None:
    default, prefix = fields.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in fields.items() if key.startswith(prefix)}
    for text in (default, *named.values()):
        if not isinstance(text, str | None):
            raise ValueError(f"tokenizer.chat_template in {where} is no text; fetch the file again")
    return named | ({} if default is None else {"default": default}) if named else default
