"""Texts and conversations → ragged token ids, cut at a maximum length, with a report of what was cut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from melora_jax.models.gguf import tokenizer_from_gguf
from train.data.conversations import Conversation
from train.data.templates import Rendered, Template
from train.hosts.shares import ALONE, Share, placed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # texts that are tokenised at once
Ids = tuple[np.ndarray, np.ndarray]  # token ids, and which of them belong to responses


class _Ragged:
    """Rows of different lengths; a row that another process holds is None."""

    input_ids: Sequence[np.ndarray | None]
    sizes: Sequence[int] | None

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int32 [rows]."""
        return np.array(_lengths_of(self.input_ids) if self.sizes is None else self.sizes, np.int32)


@dataclasses.dataclass(frozen=True)
class Tokens(_Ragged):
    """Token ids of each row, int32 [tokens]; `token_type_ids` likewise if the model has them.

    A row that another process holds is None; `sizes` then has the lengths of all rows.
    """

    input_ids: Sequence[np.ndarray | None]
    token_type_ids: Sequence[np.ndarray | None] | None
    sizes: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Examples(_Ragged):
    """Token ids of each example, int32 [tokens], and which of them count in the loss, bool [tokens].

    An example that another process holds is None; `sizes` then has the lengths of all examples.
    """

    input_ids: Sequence[np.ndarray | None]
    counted: Sequence[np.ndarray | None]
    sizes: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class TokenReport:
    """Lengths of rows in tokens before they were cut, and how many were cut to `max_length`."""

    rows: int
    truncated: int
    median: float
    p95: float
    longest: int
    max_length: int

    @classmethod
    def of(cls, lengths: np.ndarray, max_length: int) -> TokenReport:
        """The report on rows of these lengths, int [rows]."""
        median, p95 = np.percentile(lengths, [50, 95])
        truncated = int((lengths > max_length).sum())
        return TokenReport(len(lengths), truncated, float(median), float(p95), int(lengths.max()), max_length)

    def __str__(self) -> str:
        return f"{self._described()}; {self.truncated:,} cut to {self.max_length}"

    def _described(self) -> str:
        return f"{self.rows:,} rows, tokens median {self.median:.0f}, p95 {self.p95:.0f}, longest {self.longest:,}"


@dataclasses.dataclass(frozen=True)
class InstructionReport(TokenReport):
    """What tokenising did to the rows of instruction data.

    Attributes:
      tokens_lost: tokens that cutting removed.
      without_response: rows left without any token of a response; `dropped` says whether they were removed.
      counted: tokens that count in the loss, out of the `tokens` kept.
    """

    tokens_lost: int
    without_response: int
    dropped: bool
    counted: int
    tokens: int

    def __str__(self) -> str:
        cut = f"{self.truncated:,} cut to {self.max_length}, {self.tokens_lost:,} tokens lost"
        fate = "dropped" if self.dropped else "kept for the loss on all tokens"
        without = f"; {self.without_response:,} lost their whole response and were {fate}" * (self.without_response > 0)
        return f"{self._described()}; {cut}{without}; {self.counted:,} of {self.tokens:,} tokens count in the loss"


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, hub id or GGUF file. It needs no padding token.

    Raises:
      ValueError: there is none, or the hub is not in reach.
    """
    return _tokenizer(name, repr(name), "tokenizer.json")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.name`, with a padding token.

    Raises:
      ValueError: there is none, the hub is not in reach, or it has no padding token.
    """
    tokenizer = _tokenizer(name, f"model.name={name!r}", "tokenizer.json or vocab.txt")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no padding token; set pad_token in its tokenizer_config.json")
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str | None]],
    max_length: int,
    share: Share = ALONE,
) -> tuple[Tokens, TokenReport]:
    """Token ids of one or two text columns; rows over `max_length` lose tokens of the longer text first.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: one or two columns of equal length, at least one row; None for a row that another process holds.
      max_length: tokens a row, special tokens included.
      share: exchanges lengths with the other processes.

    Raises:
      ValueError: `max_length` is over what the tokenizer's model takes.
    """
    _check_length(tokenizer, max_length)
    held = [row for row, text in enumerate(texts[0]) if text is not None]
    own: Any = [[column[row] for row in held] for column in texts]
    found, uncut = share.together(lambda: _encode_texts(tokenizer, own, max_length))
    columns = {key: placed(ids, held, len(texts[0])) for key, ids in found.items()}
    full = np.array(share.merge(placed(uncut, held, len(texts[0]))))
    sizes = share.merge(_lengths_of(columns["input_ids"]))
    return Tokens(columns["input_ids"], columns.get("token_type_ids"), sizes), TokenReport.of(full, max_length)


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    conversations: Sequence[Conversation | None],
    max_length: int,
    loss: Literal["responses", "all"] = "responses",
    lost: Literal["drop", "error"] = "drop",
    share: Share = ALONE,
) -> tuple[Examples, InstructionReport]:
    """Token ids of each conversation by `template`; the end of text is appended if the template closes no response.

    Rows over `max_length` keep their first tokens. With loss "responses", the tokens of every assistant turn and of its
    end count, also a token that a response shares with the text before it. With "all", every token counts.

    Args:
      tokenizer: a fast one, with an end-of-text token if the template needs it.
      template: makes the text of a conversation.
      conversations: at least one, checked by `read_conversations`; None for one that another process holds.
      max_length: tokens a row.
      loss: which tokens count.
      lost: what happens to a row without any token of a response after the cut, if `loss` is "responses".
      share: exchanges lengths with the other processes.

    Raises:
      ValueError: `max_length` is over what the tokenizer's model takes, the tokenizer can't locate its tokens in the
        text, the template refuses a row, a row lost its response and `lost` is "error", or no row is left.
    """
    _check_fast(tokenizer)
    _check_length(tokenizer, max_length)
    held = [row for row, conversation in enumerate(conversations) if conversation is not None]
    own = [conversation for conversation in conversations if conversation is not None]
    pairs = placed(share.together(lambda: _encode_conversations(tokenizer, template, own)), held, len(conversations))
    lengths = np.array(share.merge([None if pair is None else len(pair[0]) for pair in pairs]))
    answers = [None if pair is None else bool(pair[1][:max_length].any()) for pair in pairs]
    has_response, drop = np.array(share.merge(answers), bool), loss == "responses"
    if drop and not has_response.all():
        places = [None if conversation is None else conversation.place for conversation in conversations]
        first = share.merge([None if has_response[row] else place for row, place in enumerate(places)])
        _check_lost(first, has_response, max_length, lost)
    kept = np.flatnonzero(has_response) if drop else np.arange(len(pairs))
    cut = [None if (pair := pairs[row]) is None else _cut(*pair, max_length, drop) for row in kept]
    sizes = np.minimum(lengths[kept], max_length).tolist()
    examples = Examples([pair and pair[0] for pair in cut], [pair and pair[1] for pair in cut], sizes)
    report = InstructionReport(
        **vars(TokenReport.of(lengths, max_length)),
        tokens_lost=int(np.maximum(lengths - max_length, 0).sum()),
        without_response=int((~has_response).sum()),
        dropped=drop,
        counted=sum(share.gather(lambda: sum(int(mask.sum()) for mask in examples.counted if mask is not None))),
        tokens=int(examples.lengths.sum()),
    )
    return examples, report


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: Template, conversation: Conversation) -> np.ndarray:
    """The token ids, int32 [tokens], from which the answer to the conversation's last turn is generated.

    Raises:
      ValueError: the template refuses the conversation.
    """
    encoded = tokenizer(template.prompt(conversation), add_special_tokens=template.adds_special, verbose=False)
    return np.asarray(encoded["input_ids"], np.int32)


def _tokenizer(name: str, said: str, files: str) -> PreTrainedTokenizerBase:
    if name.lower().endswith(".gguf"):
        return tokenizer_from_gguf(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no tokenizer at {said}; it needs {files}: {reason}") from error


def _check_length(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length={max_length} is over the {tokenizer.model_max_length} tokens the model takes; lower it"
        )


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} can't tell where in the text its tokens stand; save a fast "
            "one (tokenizer.json) into the folder"
        )


def _check_lost(places: Sequence[str], has_response: np.ndarray, max_length: int, lost: str) -> None:
    first, count = places[int(np.argmin(has_response))], int((~has_response).sum())
    if lost == "error":
        others = f" ({count - 1:,} more rows too)" if count > 1 else ""
        raise ValueError(f"{first} keeps no token of its response at data.max_length={max_length}{others}; raise it")
    if not has_response.any():
        raise ValueError(f"no row keeps a token of its response at data.max_length={max_length}; raise it")


def _lengths_of(rows: Sequence[np.ndarray | None]) -> list[int | None]:
    return [None if row is None else len(row) for row in rows]


def _encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], max_length: int
) -> tuple[dict[str, list[np.ndarray]], list[int]]:
    """The ids by key, and each row's length before it was cut."""
    keys = [key for key in ("input_ids", "token_type_ids") if key in tokenizer.model_input_names]
    columns: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    for start in range(0, len(texts[0]), _CHUNK):
        chunk = _encode_columns(tokenizer, [column[start : start + _CHUNK] for column in texts], keys)
        for key in keys:
            columns[key] += chunk[key]
    full = [len(ids) for ids in columns["input_ids"]]
    long = [row for row, length in enumerate(full) if length > max_length]
    if long:
        cut = _encode_columns(tokenizer, [[column[row] for row in long] for column in texts], keys, max_length)
        for key in keys:
            for row, ids in zip(long, cut[key], strict=True):
                columns[key][row] = ids
    return columns, full


def _encode_columns(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], keys: Sequence[str], max_length: int | None = None
) -> dict[str, list[np.ndarray]]:
    encoded = tokenizer(
        texts[0],
        text_pair=texts[1] if len(texts) > 1 else None,
        truncation="longest_first" if max_length else False,
        max_length=max_length,
        return_token_type_ids="token_type_ids" in keys,
        return_attention_mask=False,
        verbose=False,
    )
    return {key: [np.asarray(ids, np.int32) for ids in encoded[key]] for key in keys}


def _encode_conversations(
    tokenizer: PreTrainedTokenizerBase, template: Template, conversations: Sequence[Conversation]
) -> list[Ids]:
    """The uncut ids of each conversation, with the end of text."""
    pairs: list[Ids] = []
    for start in range(0, len(conversations), _CHUNK):
        rendered = [template.render(conversation) for conversation in conversations[start : start + _CHUNK]]
        pairs += _encode_rendered(tokenizer, rendered, template.adds_special)
    return pairs


def _encode_rendered(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered], adds_special: bool
) -> Iterator[Ids]:
    encoded = tokenizer(
        [row.text for row in rendered],
        add_special_tokens=adds_special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for row, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        responses = _in_responses(np.asarray(offsets, np.int64).reshape(-1, 2), row)
        yield _closed(tokenizer, np.asarray(ids, np.int32), responses, row)


def _in_responses(offsets: np.ndarray, row: Rendered) -> np.ndarray:
    """The tokens with at least one character in a response, bool [tokens]."""
    ends = offsets[:, 1]
    # Some tokenizers leave leading space out of a token's offsets, and a token of nothing but space gets empty ones.
    starts = np.where(offsets[:, 0] < ends, offsets[:, 0], np.concatenate([[0], ends[:-1]]))
    inside = np.zeros(len(offsets), bool)
    for start, end in row.responses:
        inside |= (ends > start) & (starts < end)
    return inside


def _closed(tokenizer: Any, ids: np.ndarray, responses: np.ndarray, row: Rendered) -> Ids:
    """The ids with the end of text after a last response that the template does not close."""
    if row.closed:
        return ids, responses
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token, so answers would never end; set "
            "eos_token in its tokenizer_config.json"
        )
    if len(ids) and ids[-1] == end:
        return ids, np.concatenate([responses[:-1], [True]])
    return np.append(ids, np.int32(end)), np.append(responses, True)


def _cut(ids: np.ndarray, responses: np.ndarray, max_length: int, only_responses: bool) -> Ids:
    """The tokens that are kept, and which of them count: those of responses, or all."""
    ids, responses = ids[:max_length], responses[:max_length]
    return ids, responses if only_responses else np.ones(len(ids), bool)
