"""Instruction data → token ids and the tokens that count in the loss, cut at a maximum length with a count of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from train.data.conversations import Conversation
from train.data.templates import Rendered, Template
from train.data.tokens import lengths_of
from train.hosts.shares import ALONE, Share, placed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Examples:
    """Token ids, int32 [tokens], and which of them count in the loss, bool [tokens], of each example.

    An example that another process holds is None; `sizes` are then the lengths of all examples.
    """

    input_ids: Sequence[np.ndarray | None]
    counted: Sequence[np.ndarray | None]
    sizes: Sequence[int] | None = None

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [examples]."""
        return np.array(lengths_of(self.input_ids) if self.sizes is None else self.sizes, np.int32)


@dataclasses.dataclass(frozen=True)
class InstructionReport:
    """What tokenising did to the rows. Lengths are in tokens, before cutting.

    Attributes:
      rows: rows given.
      truncated: rows cut to `max_length`; tokens_lost: tokens that this took away.
      without_response: rows of which no token of a response was left; dropped: whether they were.
      counted: tokens that count in the loss, of tokens kept.
      median, p95, longest: lengths.
    """

    rows: int
    truncated: int
    tokens_lost: int
    without_response: int
    dropped: bool
    counted: int
    tokens: int
    median: float
    p95: float
    longest: int
    max_length: int

    def __str__(self) -> str:
        lengths = f"{self.rows:,} rows, tokens median {self.median:.0f}, p95 {self.p95:.0f}, longest {self.longest:,}"
        cut = f"{self.truncated:,} cut to {self.max_length}, {self.tokens_lost:,} tokens lost"
        fate = "dropped" if self.dropped else "kept for the loss on all tokens"
        without = f"; {self.without_response:,} lost their whole response and were {fate}" * (self.without_response > 0)
        return f"{lengths}; {cut}{without}; {self.counted:,} of {self.tokens:,} tokens count in the loss"


def tokenize_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    conversations: Sequence[Conversation | None],
    max_length: int,
    loss: Literal["responses", "all"] = "responses",
    lost: Literal["drop", "error"] = "drop",
    share: Share = ALONE,
) -> tuple[Examples, InstructionReport]:
    """Token ids of each conversation by `template`, the end of text appended where the template closes no response.

    Rows over `max_length` keep their first tokens. With loss "responses", the tokens of every assistant turn and of its
    end count; a token that is part of a response and part of what is before counts too. With "all", every token counts.

    Args:
      tokenizer: a fast one, with an end-of-text token where the template needs it.
      conversations: at least one, checked by `read_conversations`; None where another process holds it.
      max_length: tokens a row.
      loss: which tokens count.
      lost: what happens to a row that keeps no token of a response when cut, where `loss` is "responses".
      share: what exchanges lengths with the other processes.

    Raises:
      ValueError: `max_length` over what the tokenizer's model takes, a tokenizer that can't tell where tokens stand, a
        row that the template can't have, a row whose response is lost where that is an error, or no row left.
    """
    _check_tokenizer(tokenizer, max_length)
    held = [row for row, conversation in enumerate(conversations) if conversation is not None]
    own = [conversation for conversation in conversations if conversation is not None]
    pairs = placed(share.together(lambda: _encode_all(tokenizer, template, own)), held, len(conversations))
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
    counted = sum(share.gather(lambda: sum(int(mask.sum()) for mask in examples.counted if mask is not None)))
    return examples, _report(examples, lengths, counted, has_response, drop, max_length)


def _cut(ids: np.ndarray, responses: np.ndarray, max_length: int, drop: bool) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are kept, and which of them count: those of responses, or all."""
    ids, responses = ids[:max_length], responses[:max_length]
    return ids, responses if drop else np.ones(len(ids), bool)


def _encode_all(
    tokenizer: PreTrainedTokenizerBase, template: Template, conversations: Sequence[Conversation]
) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(conversations), _CHUNK):
        rendered = [template.render(conversation) for conversation in conversations[start : start + _CHUNK]]
        pairs += _encode(tokenizer, rendered, template.adds_special)
    return pairs


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: Template, conversation: Conversation) -> np.ndarray:
    """The token ids, int32 [tokens], from which the answer to the conversation's last turn is generated.

    Raises:
      ValueError: the template can't have the conversation.
    """
    encoded = tokenizer(template.prompt(conversation), add_special_tokens=template.adds_special, verbose=False)
    return np.asarray(encoded["input_ids"], np.int32)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} can't tell where in the text its tokens stand; save a fast "
            "one (tokenizer.json) into the folder"
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length={max_length} is over the {tokenizer.model_max_length} tokens the model takes; lower it"
        )


def _check_lost(places: Sequence[str], has_response: np.ndarray, max_length: int, lost: str) -> None:
    first, count = places[int(np.argmin(has_response))], int((~has_response).sum())
    if lost == "error":
        others = f" ({count - 1:,} more rows too)" if count > 1 else ""
        raise ValueError(f"{first} keeps no token of its response at data.max_length={max_length}{others}; raise it")
    if not has_response.any():
        raise ValueError(f"no row keeps a token of its response at data.max_length={max_length}; raise it")


def _report(
    examples: Examples, lengths: np.ndarray, counted: int, has_response: np.ndarray, drop: bool, max_length: int
) -> InstructionReport:
    median, p95 = np.percentile(lengths, [50, 95])
    return InstructionReport(
        rows=len(lengths),
        truncated=int((lengths > max_length).sum()),
        tokens_lost=int(np.maximum(lengths - max_length, 0).sum()),
        without_response=int((~has_response).sum()),
        dropped=drop,
        counted=counted,
        tokens=int(examples.lengths.sum()),
        median=float(median),
        p95=float(p95),
        longest=int(lengths.max()),
        max_length=max_length,
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[Rendered], adds_special: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and which are of responses, uncut."""
    encoded = tokenizer(
        [row.text for row in rendered],
        add_special_tokens=adds_special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pairs = []
    for row, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        counted = _counted(np.asarray(offsets, np.int64).reshape(-1, 2), row)
        pairs.append(_closed(tokenizer, np.asarray(ids, np.int32), counted, row))
    return pairs


def _counted(offsets: np.ndarray, row: Rendered) -> np.ndarray:
    """The tokens that stand, with one character or more, in a response."""
    ends = offsets[:, 1]
    # Some tokenizers leave leading space out of a token's offsets, and nothing is left of a token of space alone.
    starts = np.where(offsets[:, 0] < ends, offsets[:, 0], np.concatenate([[0], ends[:-1]]))
    counted = np.zeros(len(offsets), bool)
    for start, end in row.responses:
        counted |= (ends > start) & (starts < end)
    return counted


def _closed(tokenizer: Any, ids: np.ndarray, counted: np.ndarray, row: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """With the end of text after a last response that the template does not close."""
    if row.closed:
        return ids, counted
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-text token, so answers would never end; set "
            "eos_token in its tokenizer_config.json"
        )
    if len(ids) and ids[-1] == end:
        return ids, np.concatenate([counted[:-1], [True]])
    return np.append(ids, np.int32(end)), np.append(counted, True)
