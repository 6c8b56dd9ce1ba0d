"""Text → ragged token ids, cut at a maximum length, with a count of what was cut."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from melora_jax.models.gguf import tokenizer_from_gguf
from train.hosts.shares import ALONE, Share, placed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of each row, int32 of its own length; `token_type_ids` likewise where the model knows them.

    A row that another process holds is None; `sizes` are then the lengths of all rows.
    """

    input_ids: Sequence[np.ndarray | None]
    token_type_ids: Sequence[np.ndarray | None] | None
    sizes: Sequence[int] | None = None

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int32 [rows]."""
        return np.array(lengths_of(self.input_ids) if self.sizes is None else self.sizes, np.int32)


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


def lengths_of(rows: Sequence[np.ndarray | None]) -> list[int | None]:
    """How many tokens each row has that this process holds."""
    return [None if row is None else len(row) for row in rows]


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, hub id or GGUF file. It needs no padding token.

    Raises:
      ValueError: none there, or the hub not in reach.
    """
    if name.lower().endswith(".gguf"):
        return tokenizer_from_gguf(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no tokenizer at {name!r}; it needs tokenizer.json: {reason}") from error


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
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str | None]],
    max_length: int,
    share: Share = ALONE,
) -> tuple[Tokens, TokenReport]:
    """Token ids of one or two text columns; rows over `max_length` lose tokens of the longer text first.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: one or two columns of equal length, at least one row; None where another process holds the row.
      max_length: tokens a row, special tokens counted.
      share: what exchanges lengths with the other processes.

    Raises:
      ValueError: `max_length` over what the tokenizer's model takes.
    """
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"data.max_length={max_length} is over the {tokenizer.model_max_length} tokens the model takes; lower it"
        )
    held = [row for row, text in enumerate(texts[0]) if text is not None]
    own: Any = [[column[row] for row in held] for column in texts]
    found, uncut = share.together(lambda: _encode_all(tokenizer, own, max_length))
    columns = {key: placed(ids, held, len(texts[0])) for key, ids in found.items()}
    full = np.array(share.merge(placed(uncut, held, len(texts[0]))))
    median, p95 = np.percentile(full, [50, 95])
    truncated = int((full > max_length).sum())
    report = TokenReport(len(full), truncated, float(median), float(p95), int(full.max()), max_length)
    sizes = share.merge(lengths_of(columns["input_ids"]))
    return Tokens(columns["input_ids"], columns.get("token_type_ids"), sizes), report


def _encode_all(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[str]], max_length: int
) -> tuple[dict[str, list[np.ndarray]], list[int]]:
    """The ids by key, and each row's length before it was cut."""
    keys = [key for key in ("input_ids", "token_type_ids") if key in tokenizer.model_input_names]
    columns: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    for start in range(0, len(texts[0]), _CHUNK):
        chunk = _encode(tokenizer, [column[start : start + _CHUNK] for column in texts], keys)
        for key in keys:
            columns[key] += chunk[key]
    full = [len(ids) for ids in columns["input_ids"]]
    long = [row for row, length in enumerate(full) if length > max_length]
    if long:
        cut = _encode(tokenizer, [[column[row] for row in long] for column in texts], keys, max_length)
        for key in keys:
            for row, ids in zip(long, cut[key], strict=True):
                columns[key][row] = ids
    return columns, full


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
