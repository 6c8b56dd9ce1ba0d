"""The compiled programs of generation: fill the cache from the prompt, generate one token, generate in a loop.

Weights are arguments. A program is compiled once for each structure of model and shapes of arrays; other values of a
temperature, key or limit do not recompile it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from melora_jax.core.dropout import dropout_key
from melora_jax.generation.sampling import Sampling, chosen_tokens
from melora_jax.models.decoders.heads import CausalLM
from melora_jax.models.decoders.kv_cache import KVCache, take_rows

NO_TOKEN = -1  # in place of a token if a logit is NaN


class Rules(NamedTuple):
    """What does not change during a call.

    Attributes:
      sampling: how tokens are chosen.
      key: a PRNG key; None if nothing is sampled.
      ends: int32 `[e]`, the tokens that end a row, padded with NO_TOKEN.
      pad: int32, fills a row after its end.
    """

    sampling: Sampling
    key: jax.Array | None
    ends: jax.Array
    pad: jax.Array


class Newest(NamedTuple):
    """The newest tokens.

    Attributes:
      tokens: int32 `[b]`.
      stopped: bool `[b]`, rows that ended with this token or an earlier one.
      rows: int32 `[b]`, each row's number in the original batch.
      generated: int32, the number of tokens of each row, including these.
    """

    tokens: jax.Array
    stopped: jax.Array
    rows: jax.Array
    generated: jax.Array


class Programs(NamedTuple):
    """Jitted functions of a model's state from `nnx.split`. `step` and `loop` donate the cache.

    Attributes:
      prefill: `(state, ids, valid, rules, places) -> (newest, cache)`; writes left-padded prompts `[b, t]` to a new
        cache of `places` tokens.
      step: `(state, cache, newest, rules) -> (newest, cache)`.
      keep: `(newest, cache, rows) -> (newest, cache)`; selects the rows, int32 `[c]`.
      loop: `(state, cache, newest, rules, limit, room) -> (tokens, cache)`; runs until all rows have ended or have
        `limit` tokens. The tokens are `[b, room]`, starting with `newest`, with padding after `limit`.
    """

    prefill: Callable[..., Any]
    step: Callable[..., Any]
    keep: Callable[..., Any]
    loop: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def programs(graphdef: nnx.GraphDef[CausalLM]) -> Programs:
    """The programs for all models of one structure."""

    def prefill(
        state: nnx.State, ids: jax.Array, valid: jax.Array, rules: Rules, places: int
    ) -> tuple[Newest, KVCache]:
        with dropout_key(None):
            model = nnx.merge(graphdef, state, copy=True)
            hidden, cache = model.advance(ids, model.make_cache(ids.shape[0], places), valid)
            rows = jnp.arange(ids.shape[0], dtype=jnp.int32)
            nothing = Newest(ids[:, -1], jnp.zeros(rows.shape, bool), rows, jnp.zeros((), jnp.int32))
            return _following(model.logits(hidden[:, -1]), nothing, rules), cache

    def step(state: nnx.State, cache: KVCache, newest: Newest, rules: Rules) -> tuple[Newest, KVCache]:
        with dropout_key(None):
            model = nnx.merge(graphdef, state, copy=True)
            hidden, cache = model.advance(newest.tokens[:, None], cache)
            return _following(model.logits(hidden[:, -1]), newest, rules), cache

    def loop(
        state: nnx.State, cache: KVCache, newest: Newest, rules: Rules, limit: jax.Array, room: int
    ) -> tuple[jax.Array, KVCache]:
        def unfinished(carry: tuple[jax.Array, Newest, KVCache]) -> jax.Array:
            return (carry[1].generated < limit) & ~carry[1].stopped.all()

        def one_more(carry: tuple[jax.Array, Newest, KVCache]) -> tuple[jax.Array, Newest, KVCache]:
            tokens, newest, cache = carry
            place = newest.generated
            newest, cache = step(state, cache, newest, rules)
            return tokens.at[:, place].set(newest.tokens), newest, cache

        tokens = jnp.full((newest.tokens.shape[0], room), rules.pad).at[:, 0].set(newest.tokens)
        tokens, _, cache = jax.lax.while_loop(unfinished, one_more, (tokens, newest, cache))
        return tokens, cache

    return Programs(
        prefill=jax.jit(prefill, static_argnames="places"),
        step=jax.jit(step, donate_argnames="cache"),
        keep=jax.jit(_kept),
        loop=jax.jit(loop, donate_argnames="cache", static_argnames="room"),
    )


def _following(logits: jax.Array, newest: Newest, rules: Rules) -> Newest:
    tokens = chosen_tokens(logits, rules.sampling, rules.key, newest.rows, newest.generated)
    tokens = jnp.where(newest.stopped, rules.pad, tokens)
    broken = jnp.isnan(logits).any(axis=-1) & ~newest.stopped
    ended = (tokens[:, None] == rules.ends).any(axis=-1)
    tokens = jnp.where(broken, NO_TOKEN, tokens)
    # a NaN in one row ends all rows: the caller raises an error
    return Newest(tokens, newest.stopped | ended | broken.any(), newest.rows, newest.generated + 1)


def _kept(newest: Newest, cache: KVCache, rows: jax.Array) -> tuple[Newest, KVCache]:
    tokens, stopped, numbers = (array[rows] for array in (newest.tokens, newest.stopped, newest.rows))
    return Newest(tokens, stopped, numbers, newest.generated), take_rows(cache, rows)
