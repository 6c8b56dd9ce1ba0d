"""The tokenizer inside a GGUF file, as transformers has it: first its vocabulary, checked, then what is built from it.

A GGUF file holds the vocabulary, and of the way text is cut before the merges only a name, `tokenizer.ggml.pre`. The
cut decides which merges can happen (SmolLM's separates all digits), so an unknown name is refused, not guessed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from melora_jax.models.gguf.reader import GGUFFile

MODELS = ("gpt2", "llama")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS = ("gpt-2", "smollm", *LLAMA3, "qwen2")
# every way to split a token in two is tried, so a token of megabytes would take hours
_LONGEST = 1024
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Token(enum.IntEnum):
    """The types of tokens that merges do not make, by their numbers in `tokenizer.ggml.token_type`."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    BYTE = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer, checked.

    Attributes:
      where: the file, for errors.
      model: `tokenizer.ggml.model`, one of MODELS.
      pre: `tokenizer.ggml.pre`; one of PRE_TOKENIZERS for gpt2.
      tokens: the text of each token.
      types: the `Token` type of each.
      scores: the score of each for llama; empty for gpt2.
      merges: pairs of tokens that make a token for gpt2, in the order of their priority; empty for llama.
      special: transformers' names of special tokens, and their texts.
      adds: whether the beginning-of-text and the end-of-text token are added.
      adds_space: whether a space is added before the first word (llama).
      max_length: the model's context length; None if the file does not say.
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
            f"tokenizer.ggml.tokens in {where} has a token twice, or one without 1 to {_LONGEST} characters; fetch it"
            " again"
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
        raise ValueError(f"tokenizer.ggml.{key} in {where} is not a list of {kind.__name__}; fetch the file again")
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
            raise ValueError(
                f"tokenizer.ggml.merges in {where}: {merge!r:.99} does not join two tokens to a token; fetch the"
                " file again"
            )
        merges.append((left, right))
    return merges


def _special(known: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    named = {}
    for name, key in _SPECIAL.items():
        index = known.get(f"{key}_token_id")
        if index is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise ValueError(
                    f"tokenizer.ggml.{key}_token_id={index!r:.99} in {where} is not one of its {len(tokens)} tokens;"
                    " fetch the file again"
                )
            named[name] = tokens[index]
    return named


def _chat_template(fields: Mapping[str, Any], where: str) -> str | dict[str, str] | None:
    default, prefix = fields.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in fields.items() if key.startswith(prefix)}
    for text in (default, *named.values()):
        if not isinstance(text, str | None):
            raise ValueError(f"tokenizer.chat_template in {where} is not text; fetch the file again")
    return named | ({} if default is None else {"default": default}) if named else default


if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "▁"


def tokenizer_from_gguf(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, built from its vocabulary, merges or scores, and special tokens.

    Args:
      path: the file, of a byte-level BPE (`tokenizer.ggml.model` gpt2) cut as GPT-2, SmolLM, Llama 3 or Qwen2 cut, or
        of a SentencePiece BPE (llama), as in Llama 2, Mistral and Gemma.

    Returns:
      A transformers tokenizer, with the chat template if the file has one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, has no tokenizer or contradictory lists, or the tokenizer is of another kind;
        or transformers or the gguf package is missing.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    >>> tokenizer_from_gguf("model.gguf")
    Traceback (most recent call last):
    FileNotFoundError: model.gguf does not exist; check the name, or fetch the file again
    """
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ValueError("a tokenizer needs transformers; install it: pip install 'melora_jax[gguf]'") from error

    vocabulary = vocabulary_from_gguf(GGUFFile(path))
    backend = _MODELS[vocabulary.model](vocabulary)
    _add_tokens(backend, vocabulary)
    _add_template(backend, vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=vocabulary.max_length,
        **vocabulary.special,
    )
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    whole_words = vocabulary.pre in LLAMA3
    backend = Tokenizer(models.BPE(vocabulary.ids(), vocabulary.merges, ignore_merges=whole_words))
    if vocabulary.pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[str(vocabulary.pre)]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: the pair whose token has the highest score is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = vocabulary.special.get("unk_token")
    model = models.BPE(
        vocabulary.ids(), _scored_merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = [normalizers.Prepend(_SPACE)] if vocabulary.adds_space else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.adds_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    aside = (Token.UNKNOWN, Token.CONTROL, Token.USER_DEFINED, Token.BYTE)
    scores = {
        token: score
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
        if kind not in aside
    }
    merges = [
        (token[:cut], token[cut:])
        for token in scores
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return sorted(merges, key=lambda merge: (-scores[merge[0] + merge[1]], -len(merge[0])))


def _add_tokens(backend: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control and user-defined tokens are matched before the text is cut; control tokens count as special."""
    from tokenizers import AddedToken

    special = set(vocabulary.special.values())
    added = [
        AddedToken(token, special=kind != Token.USER_DEFINED or token in special, normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (Token.UNKNOWN, Token.CONTROL, Token.USER_DEFINED) or token in special
    ]
    backend.add_tokens(added)


def _add_template(backend: Tokenizer, vocabulary: Vocabulary) -> None:
    from tokenizers.processors import TemplateProcessing

    ids = vocabulary.ids()
    ends = []
    for adds, name in zip(vocabulary.adds, ("bos_token", "eos_token"), strict=True):
        if adds and name not in vocabulary.special:
            raise ValueError(f"the tokenizer in {vocabulary.where} adds a {name} but has none; fetch the file again")
        ends.append([vocabulary.special[name]] if adds else [])
    first, last = ends
    backend.post_processor = TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[(token, ids[token]) for token in {*first, *last}],
    )


def _gpt2_cut() -> PreTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel(add_prefix_space=False)


def _smollm_cut() -> PreTokenizer:
    from tokenizers.pre_tokenizers import Digits, Sequence

    return Sequence([Digits(individual_digits=True), _gpt2_cut()])


def _cut_by_tens(digits: str) -> PreTokenizer:
    """The cut of Llama 3 and Qwen2, which differ in how many digits stay together."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2_cut,
    "smollm": _smollm_cut,
    **dict.fromkeys(LLAMA3, lambda: _cut_by_tens(r"\p{N}{1,3}")),
    "qwen2": lambda: _cut_by_tens(r"\p{N}"),
}
_MODELS: dict[str, Callable[[Vocabulary], Tokenizer]] = {"gpt2": _byte_level, "llama": _sentencepiece}
