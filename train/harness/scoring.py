"""Compiled programs that score continuations: they compute a shared beginning once, and each context once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import melora_jax as mj
from melora_jax.nn import batch_sharding
from train.harness.batches import Batch, Tokens

_TOKENS_AT_ONCE = 512  # tokens whose logits over the vocabulary are held at a time


class Scores(NamedTuple):
    """Each continuation's log-likelihood, float32 `[r]`, and whether all its tokens are the likeliest, bool `[r]`."""

    log_likelihood: jax.Array
    greedy: jax.Array


class Scorer:
    """Scores batches with one model, and keeps the keys and values of the last shared beginning.

    Args:
      model: a causal language model, plain or adapted; its variables are read once.
      mesh: where the model and a batch's rows lie; None for one device.
    """

    def __init__(self, model: Any, mesh: Mesh | None = None) -> None:
        graphdef, self._state = nnx.split(model)
        self._programs = _programs(graphdef)
        self._mesh = mesh
        self._shared: tuple[Tokens, Any] = ((), None)

    def __call__(self, batch: Batch) -> Scores:
        """A batch's scores, on the device: `Σ_j log p(continuation_j | context, continuation_<j)`."""
        if batch.shared != self._shared[0]:
            ids = np.array([batch.shared], np.int32)
            self._shared = (batch.shared, self._programs.begin(self._state, ids) if batch.shared else None)
        arrays = (batch.ids, batch.valid, batch.parents, batch.continuations, batch.counts)
        return self._programs.score(self._state, self._shared[1], *map(self._placed, arrays), batch.places)

    def _placed(self, array: np.ndarray) -> Any:
        """The array on the mesh, its rows divided over the devices if they divide evenly."""
        if self._mesh is None:
            return array
        parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        whole = jax.sharding.NamedSharding(self._mesh, jax.P())
        return jax.device_put(array, whole if len(array) % parts else batch_sharding(self._mesh))


class _Programs(NamedTuple):
    begin: Callable[..., Any]
    score: Callable[..., Scores]


@functools.lru_cache(maxsize=8)
def _programs(graphdef: nnx.GraphDef[Any]) -> _Programs:
    def begin(state: nnx.State, ids: jax.Array) -> Any:
        """The cache of the beginning `[1, l]`."""
        with mj.dropout_key(None):
            model = nnx.merge(graphdef, state, copy=True)
            return model.advance(ids, model.make_cache(*ids.shape))[1]

    def score(
        state: nnx.State,
        shared: Any,
        ids: jax.Array,
        valid: jax.Array,
        parents: jax.Array,
        continuations: jax.Array,
        counts: jax.Array,
        places: int,
    ) -> Scores:
        with mj.dropout_key(None):
            model = nnx.merge(graphdef, state, copy=True)
            contexts = ids.shape[0]
            if shared is None:
                cache = model.make_cache(contexts, places)
            else:
                cache = _rows(_longer(shared, places), jnp.zeros(contexts, jnp.int32))
            hidden, cache = model.advance(ids, cache, valid)
            first = _token_scores(model.logits(hidden[:, -1])[parents], continuations[:, 0])
            if continuations.shape[1] == 1:
                return first
            inputs, targets = continuations[:, :-1], continuations[:, 1:]
            counted = jnp.arange(targets.shape[1]) < counts[:, None] - 1
            hidden, _ = model.advance(inputs, _rows(cache, parents), counted)
            later = _in_pieces(model.logits, hidden, targets)
            total = first.log_likelihood + jnp.where(counted, later.log_likelihood, 0.0).sum(axis=1)
            return Scores(total, first.greedy & (later.greedy | ~counted).all(axis=1))

    return _Programs(jax.jit(begin), jax.jit(score, static_argnames="places"))


def _in_pieces(logits_of: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array) -> Scores:
    """`_token_scores` of `[r, t]` tokens, for about `_TOKENS_AT_ONCE` at a time."""
    rows, length = targets.shape
    pieces = min(length, -(-rows * length // _TOKENS_AT_ONCE))
    width = -(-length // pieces)
    pad = width * pieces - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, pieces, width, -1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(rows, pieces, width)
    scores = jax.lax.map(
        lambda piece: _token_scores(logits_of(piece[0]), piece[1]),
        (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)),
    )
    whole = (jnp.moveaxis(part, 0, 1).reshape(rows, -1)[:, :length] for part in scores)
    return Scores(*whole)


def _token_scores(logits: jax.Array, targets: jax.Array) -> Scores:
    """Each token's log-probability, and whether none is likelier: logits `[..., v]`, targets `[...]`."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return Scores(chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets)


def _rows(cache: Any, rows: jax.Array) -> Any:
    """The cache restricted to these rows; stacked layers have one more axis in front."""
    keys, values = (tuple(jnp.take(x, rows, axis=x.ndim - 4) for x in some) for some in (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values, positions=cache.positions[rows], valid=cache.valid[rows])


def _longer(cache: Any, places: int) -> Any:
    """The cache with room for `places` tokens a row."""
    more = places - cache.positions.shape[1]

    def padded(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, more if number == axis else 0) for number in range(x.ndim)])

    keys, values = (tuple(padded(x, x.ndim - 3) for x in some) for some in (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values, positions=padded(cache.positions, 1), valid=padded(cache.valid, 1))
