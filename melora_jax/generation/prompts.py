"""The prompts of a batch: checked, and laid out so that the last token of every one stands in the last column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from melora_jax.models.inputs import checked_mask, matrix_of_whole_numbers, require_below

_LEAST_UNIT = 16


def prompts_of(input_ids: ArrayLike, attention_mask: ArrayLike | None, vocabulary: int) -> list[np.ndarray]:
    """The tokens of each row without its padding, wherever that stands.

    Args:
      input_ids: whole numbers `[b, t]`.
      attention_mask: `[b, t]`, 0 at padding; None where there is none.
      vocabulary: ids lie below it.

    Raises:
      ValueError: there is no row or one without tokens, lengths or shapes differ, or an id is outside the vocabulary.

    >>> [row.tolist() for row in prompts_of([[0, 7, 8], [9, 0, 0]], [[0, 1, 1], [1, 0, 0]], 11)]
    [[7, 8], [9]]
    """
    ids = matrix_of_whole_numbers("input_ids", _matrix(input_ids))
    if not ids.shape[0]:
        raise ValueError("input_ids hold 0 rows; give at least one prompt")
    require_below(ids, vocabulary, "input_ids", "vocab_size", "use the tokenizer of this checkpoint")
    mask = np.ones(ids.shape) if attention_mask is None else np.asarray(checked_mask(attention_mask, ids.shape))
    prompts = [row[is_token] for row, is_token in zip(np.asarray(ids), mask != 0, strict=True)]
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"the prompt in row {number} has no tokens; start it with the tokenizer's first token")
    return prompts


def _matrix(input_ids: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(input_ids)
    except ValueError:
        raise ValueError(
            "input_ids have rows of unequal length; pad them to one length and mark padding by 0 in attention_mask"
        ) from None


def require_context(prompts: Sequence[np.ndarray], max_new_tokens: int, limit: int) -> None:
    """Checks that every prompt and its new tokens fit into a context of `limit` tokens.

    Raises:
      ValueError: one does not.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if longest + max_new_tokens <= limit:
        return
    remedy = f"shorten it to fewer than {limit:,}"
    if longest < limit:
        remedy = f"shorten it, or set max_new_tokens to at most {limit - longest:,}"
    raise ValueError(
        f"the prompt in row {lengths.index(longest)} has {longest:,} tokens; with max_new_tokens={max_new_tokens:,}"
        f" that is more than the model's context of {limit:,}; {remedy}"
    )


def padded_left(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, int32, and which are tokens, bool: both `[b, t]`, t rounded up.

    Args:
      prompts: each of at least one token.
    """
    width = rounded_up(max(map(len, prompts)))
    ids, valid = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = True
    return ids, valid


def rounded_up(count: int) -> int:
    """At most a quarter more, or a multiple of 16: few sizes, so that few programs are compiled.

    >>> [rounded_up(count) for count in (1, 16, 17, 100, 129, 2049)]
    [16, 16, 32, 112, 160, 2560]
    """
    unit = max(_LEAST_UNIT, 1 << max(count.bit_length() - 3, 0))
    return -(-count // unit) * unit
