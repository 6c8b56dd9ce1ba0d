"""Text generation with a decoder: all tokens at once (`generate`) or one step at a time (`stream`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from melora_jax.files.safetensors_io import read_json
from melora_jax.generation.decode_loop import NO_TOKEN, Programs, Rules, programs
from melora_jax.generation.sampling import Sampling, checked_sampling
from melora_jax.models.decoders.heads import CausalLM
from melora_jax.models.hub.checkpoint import origin_of
from melora_jax.models.inputs import checked_mask, matrix_of_whole_numbers, require_below
from melora_jax.validation import check_count

_LEAST_UNIT = 16


class Generation(NamedTuple):
    """Generated tokens.

    Attributes:
      tokens: int32 `[b, m]`, the new tokens of each row, with `pad_token_id` after its end; m is the longest row's
        length.
      lengths: int32 `[b]`, the number of new tokens of each row, including the one that ended it.
      stopped: bool `[b]`, True if a token of `eos_token_id` ended the row, False if `max_new_tokens` did.

    >>> tokens = Generation(np.array([[4, 2], [7, 9]]), np.array([2, 1]), np.array([True, True]))
    >>> [row[:length].tolist() for row, length in zip(tokens.tokens, tokens.lengths)]
    [[4, 2], [7]]
    """

    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray


class NewTokens(NamedTuple):
    """The next token of each row, from `stream`.

    Attributes:
      tokens: int32 `[b]`; `pad_token_id` in rows that ended earlier.
      stopped: bool `[b]`, True if a token of `eos_token_id` has ended the row, now or earlier.

    >>> NewTokens(np.array([4, 2]), np.array([False, True])).tokens.tolist()
    [4, 2]
    """

    tokens: np.ndarray
    stopped: np.ndarray


def generate(
    model: nnx.Module,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Generation:
    """Continues prompts with the likeliest tokens, or with samples from `softmax(filter(logits / temperature))`.

    The first call for each structure of model and size of batch and prompt compiles. Sizes are rounded up, so that
    prompts of similar length share a compiled program. The tokens sampled for row j do not depend on the other rows.

    Args:
      model: a causal language model, plain or adapted.
      input_ids: int `[b, t]`.
      attention_mask: `[b, t]`, 0 at padding (left or right); None if there is no padding.
      max_new_tokens: the largest number of new tokens per row.
      temperature: 0 takes the likeliest token; above 0, tokens are sampled.
      top_k: the number of likeliest tokens to sample from; None for all.
      top_p: samples from the smallest set of likeliest tokens with this probability mass, after `top_k`; None for all.
      key: a PRNG key, required if tokens are sampled.
      eos_token_id: the token or tokens that end a row; `()` for none. None takes those of the checkpoint's
        generation_config.json or, if there is none, of its config.json.
      pad_token_id: fills a row after its end; None takes the configuration's, or the first of `eos_token_id`.

    Returns:
      A `Generation` of NumPy arrays.

    Raises:
      ValueError: a prompt is empty or, with `max_new_tokens`, longer than the model's context; an id is outside the
        vocabulary, a setting is out of range, or a logit is NaN.

    >>> from melora_jax.models import model_from_config
    >>> sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "llama", **sizes}, task="causal-lm")
    >>> generate(model, [[3, 1, 4], [1, 5, 9]], max_new_tokens=5).tokens.shape
    (2, 5)
    """
    sampling = checked_sampling(temperature, top_k, top_p)
    task = _task(model, input_ids, attention_mask, max_new_tokens, sampling, key, eos_token_id, pad_token_id)
    newest, cache = task.prefill()
    limit, room = jnp.int32(max_new_tokens), _rounded_up(max_new_tokens)
    tokens, _ = task.programs.loop(task.state, cache, newest, task.rules, limit, room)
    return _generation(_checked_tokens(np.asarray(tokens)[:, :max_new_tokens]), np.asarray(task.rules.ends))


def stream(
    model: nnx.Module,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Generator[NewTokens, Sequence[int] | None]:
    """Like `generate`, but yields one `NewTokens` per step until all rows have ended.

    The call itself checks the arguments; the generator does the work and may be abandoned early. To drop rows, send it
    the numbers of the rows to continue (`generator.send([0, 2])` in place of `next`); the others then cost nothing.

    Args:
      model, input_ids, attention_mask, max_new_tokens, temperature, top_k, top_p, key, eos_token_id, pad_token_id: as
        in `generate`.

    Raises:
      ValueError: as in `generate`, or a row number that was sent does not exist.

    >>> from melora_jax.models import model_from_config
    >>> sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=7,
    ...              max_position_embeddings=13)
    >>> model = model_from_config({"model_type": "llama", **sizes}, task="causal-lm")
    >>> [new.tokens.shape for new in stream(model, [[3, 1, 4]], max_new_tokens=3)]
    [(1,), (1,), (1,)]
    """
    sampling = checked_sampling(temperature, top_k, top_p)
    task = _task(model, input_ids, attention_mask, max_new_tokens, sampling, key, eos_token_id, pad_token_id)
    return _steps(task, max_new_tokens)


@dataclasses.dataclass(frozen=True)
class _Task:
    """A checked call, with prompts `[b, t]` that are left-padded to a rounded width."""

    programs: Programs
    state: nnx.State
    ids: np.ndarray
    valid: np.ndarray
    rules: Rules
    places: int

    def prefill(self) -> Any:
        return self.programs.prefill(self.state, self.ids, self.valid, self.rules, self.places)


def _task(
    model: nnx.Module,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> _Task:
    if not isinstance(model, CausalLM):
        raise ValueError(
            f"{type(model).__name__} does not generate; load a decoder with from_pretrained(..., task='causal-lm')"
        )
    check_count("max_new_tokens", max_new_tokens)
    if sampling.temperature is not None and key is None:
        raise ValueError(
            f"temperature={sampling.temperature:g} samples tokens, which needs a key; give one, such as "
            "jax.random.key(0)"
        )
    vocabulary = model.sizes.vocab_size
    ends = _end_tokens(model, eos_token_id)
    pad = _padding(model, ends) if pad_token_id is None else pad_token_id
    for name, token in [*(("eos_token_id", end) for end in ends), ("pad_token_id", pad)]:
        if not _is_token(token, vocabulary):
            raise ValueError(f"{name}={token!r} must be a token of the vocabulary, from 0 to {vocabulary - 1}")
    prompts = _prompts_of(input_ids, attention_mask, vocabulary)
    _require_context(prompts, max_new_tokens, model.max_length)
    ids, valid = _padded_left(prompts)
    graphdef, state = nnx.split(model)
    # padded to a multiple of eight, so that another number of end tokens rarely compiles another program
    room = -len(ends) % 8 if ends else 8
    rules = Rules(sampling, key, jnp.array([*ends, *[NO_TOKEN] * room], jnp.int32), jnp.int32(pad))
    places = _rounded_up(ids.shape[1] + _rounded_up(max_new_tokens))
    return _Task(programs(graphdef), state, ids, valid, rules, places)


def _end_tokens(model: CausalLM, given: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a row. For a chat model, generation_config.json takes precedence over config.json."""
    file = origin_of(model).generation_config
    if given is None and file is not None:
        given = read_json(file).get("eos_token_id")
    if given is None:
        given = model.config.get("eos_token_id")
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Sequence) else (given,)


def _padding(model: CausalLM, ends: tuple[int, ...]) -> int:
    # some configurations write -1 for "none"
    configured = model.config.get("pad_token_id")
    return configured if _is_token(configured, model.sizes.vocab_size) else next(iter(ends), 0)


def _is_token(token: Any, vocabulary: int) -> TypeGuard[int]:
    return isinstance(token, int | np.integer) and not isinstance(token, bool) and 0 <= int(token) < vocabulary


def _prompts_of(input_ids: ArrayLike, attention_mask: ArrayLike | None, vocabulary: int) -> list[np.ndarray]:
    """The tokens of each row without its padding.

    Args:
      input_ids: int `[b, t]`.
      attention_mask: `[b, t]`, 0 at padding; None if there is no padding.
      vocabulary: the number of token ids.

    Raises:
      ValueError: there are no rows, a row has no tokens, shapes or lengths differ, or an id is outside the vocabulary.

    >>> [row.tolist() for row in _prompts_of([[0, 7, 8], [9, 0, 0]], [[0, 1, 1], [1, 0, 0]], 11)]
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


def _require_context(prompts: Sequence[np.ndarray], max_new_tokens: int, limit: int) -> None:
    """Raises a ValueError if a prompt with its new tokens exceeds the context of `limit` tokens."""
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


def _padded_left(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded token ids, int32 `[b, t]`, and a mask of the tokens, bool `[b, t]`, with t rounded up."""
    width = _rounded_up(max(map(len, prompts)))
    ids, valid = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = True
    return ids, valid


def _rounded_up(count: int) -> int:
    """Rounds to one of few sizes, at most a quarter or 15 larger, so that few programs are compiled.

    >>> [_rounded_up(count) for count in (1, 16, 17, 100, 129, 2049)]
    [16, 16, 32, 112, 160, 2560]
    """
    unit = max(_LEAST_UNIT, 1 << max(count.bit_length() - 3, 0))
    return -(-count // unit) * unit


def _steps(task: _Task, limit: int) -> Generator[NewTokens, Sequence[int] | None]:
    newest, cache = task.prefill()
    for left in reversed(range(limit)):
        following = None
        if left:
            # dispatched (and at first compiled) before the caller handles the current token
            following, cache = task.programs.step(task.state, cache, newest, task.rules)
        rows = yield NewTokens(_checked_tokens(np.asarray(newest.tokens)), np.asarray(newest.stopped))
        if following is None or newest.stopped.all():
            return
        newest = following
        if rows is not None:
            newest, cache = task.programs.keep(newest, cache, _checked_rows(rows, len(newest.tokens)))


def _checked_rows(rows: Sequence[int], count: int) -> np.ndarray:
    found = np.asarray(rows, np.int32)
    if found.ndim != 1 or not found.size or found.min() < 0 or found.max() >= count:
        raise ValueError(f"rows {list(rows)} to continue: give at least one row number, each from 0 to {count - 1}")
    return found


def _checked_tokens(tokens: np.ndarray) -> np.ndarray:
    if (tokens == NO_TOKEN).any():
        raise ValueError(
            "the model's logits are NaN; its weights or its adapter hold NaN or overflow the dtype, so fetch or train"
            " them again, or load the model in float32"
        )
    return tokens


def _generation(tokens: np.ndarray, ends: np.ndarray) -> Generation:
    """Cuts the columns after the longest row. Tokens after a row's end are padding already."""
    is_end = np.isin(tokens, ends)
    stopped = np.asarray(is_end.any(axis=1))
    lengths = np.where(stopped, is_end.argmax(axis=1) + 1, tokens.shape[1]).astype(np.int32)
    return Generation(tokens[:, : lengths.max()], lengths, stopped)
