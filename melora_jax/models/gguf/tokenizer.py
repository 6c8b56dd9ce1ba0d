"""The tokenizer inside a GGUF file, as transformers has it.

A GGUF file holds the vocabulary, and of the way text is cut before the merges only a name, `tokenizer.ggml.pre`. The
cut decides which merges can happen (SmolLM's puts every digit by itself), so an unknown name is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from melora_jax.models.gguf.reader import GGUFFile
from melora_jax.models.gguf.vocabulary import LLAMA3, Token, Vocabulary, vocabulary_from_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "▁"


def tokenizer_from_gguf(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, built from its vocabulary, merges or scores, and special tokens.

    Args:
      path: the file, of a byte-level BPE (`tokenizer.ggml.model` gpt2) cut as GPT-2, SmolLM, Llama 3 or Qwen2 cut, or
        of a SentencePiece BPE (llama), as Llama 2, Mistral and Gemma have.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, has no tokenizer or contradictory lists, or the tokenizer is of another kind;
        or transformers or the gguf package is missing.

    >>> tokenizer_from_gguf("model.gguf")
    Traceback (most recent call last):
    FileNotFoundError: model.gguf does not exist; check the name, or fetch the file again
    """
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ValueError("a tokenizer needs transformers; install it: pip install 'melora_jax[gguf]'") from error

    with GGUFFile(path) as file:
        vocabulary = vocabulary_from_gguf(file)
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
    """SentencePiece's BPE: of all pairs that make a token, the one of the highest score is merged first."""
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
    """Control tokens and the user's are found in a text before all else; the control tokens count as special."""
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
            raise ValueError(f"the tokenizer in {vocabulary.where} adds a {name} and has none; fetch the file again")
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
    """Llama 3's cut and Qwen2's, which differ in how many digits stay together."""
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
