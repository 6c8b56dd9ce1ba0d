"""Text → ragged token ids, cut at a maximum length, with a count of what was cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of each row, int32 of its own length; `token_type_ids` likewise where the model knows them."""

    input_ids: list[np.ndarray]
    token_type_ids: list[np.ndarray] | None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int32 [rows]."""
        return np.array([len(ids) for ids in self.input_ids], np.int32)


@dataclasses.dataclass(frozen=True)
class TokenReport:
    """Lengths in tokens before cutting, and how many rows were cut to `max_length`."""

    rows: int
    truncated: int
    median: float
    p95: float
    longest: int
    max_length: int

    def __str__(self) -> str:
        lengths = f"{self.rows:,} rows, tokens median {self.median:.0f}, p95 {self.p95:.0f}, longest {self.longest:,}"
        return f"{lengths}; {self.truncated:,} cut to {self.max_length}"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
      ValueError: none there, the hub not in reach, or one without a padding token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no tokenizer at model.name={name!r}; it needs tokenizer.json or vocab.txt: {reason}"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no padding token; set pad_token in its tokenizer_config.json")
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], max_length: int
) -> tuple[Tokens, TokenReport]:
    """Token ids of one or two text columns; rows over `max_length` lose tokens of the longer text first.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: one or two columns of equal length, at least one row.
      max_length: tokens a row, special tokens counted.

    Raises:
      ValueError: `max_length` over what the tokenizer's model takes.
    """
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length={max_length} is over the {tokenizer.model_max_length} tokens the model takes; lower it"
        )
    keys = [key for key in ("input_ids", "token_type_ids") if key in tokenizer.model_input_names]
    columns: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    for start in range(0, len(texts[0]), _CHUNK):
        chunk = _encode(tokenizer, [column[start : start + _CHUNK] for column in texts], keys)
        for key in keys:
            columns[key] += chunk[key]
    full = np.array([len(ids) for ids in columns["input_ids"]])
    long = np.flatnonzero(full > max_length)
    if len(long):
        cut = _encode(tokenizer, [[column[row] for row in long] for column in texts], keys, max_length)
        for key in keys:
            for row, ids in zip(long, cut[key], strict=True):
                columns[key][row] = ids
    median, p95 = np.percentile(full, [50, 95])
    report = TokenReport(len(full), len(long), float(median), float(p95), int(full.max()), max_length)
    return Tokens(columns["input_ids"], columns.get("token_type_ids")), report


def _encode(
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
