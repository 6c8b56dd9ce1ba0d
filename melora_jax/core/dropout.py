"""Dropout without random state in the model.

You enter a key around a forward pass; each dropout site derives its own key from it and from the site's path. So the
model holds no random state, and a training step is reproducible from `(key, step)`::

    with mj.dropout_key(jax.random.fold_in(key, step)):
        logits = model(input_ids, attention_mask)      # training: masks are drawn

    logits = model(input_ids, attention_mask)          # evaluation: without a key, nothing is dropped
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

# Each entry of a mask takes 16 random bits, a hash of the entry's place. XLA fuses the hash into the operation that
# uses the mask, so that the mask is never stored; jax.random's bits are not fused.
_LEVELS = 1 << 16

# JAX caches the traces of inner functions (jit, remat, scan) by their arguments. The key is not among these, so it
# marks the cache's entries; otherwise an earlier trace would be reused with its mask or its tracer.
_trace_mark = jax.make_user_context(default_value=None)


@dataclasses.dataclass
class _Scope:
    """An entered key and what is drawn from it.

    Attributes:
      key: the key.
      fits_traces: whether sites may draw while JAX traces: the key is an argument of what is traced, or what is traced
        runs once.
      trace: the trace in which the key, or the layer's number, was entered.
      draws: how often each site has drawn.
      marks: to leave with the scope.
      layer: the traced number of the layer that runs, in a stack of layers that share their paths.
      layer_name: stands for that number in `draws`.
    """

    key: jax.Array
    fits_traces: bool
    trace: Any
    draws: Counter[str]
    marks: contextlib.ExitStack
    layer: jax.Array | None = None
    layer_name: str = ""


_scope: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar("melora_dropout_key", default=None)


@contextlib.contextmanager
def dropout_key(key: jax.Array | None) -> Iterator[None]:
    """A context manager for training mode: dropout sites inside it draw their masks from `key`.

    JAX reads the key while it traces, so enter it inside the function that you jit, not around the call: dropout inside
    a function that was jitted outside raises a `ValueError`.

    Args:
      key: a scalar PRNG key, typed (`jax.random.key`) or raw (uint32), concrete or traced. `None` means evaluation
        mode, also inside another `dropout_key`.

    >>> import jax, jax.numpy as jnp
    >>> with dropout_key(jax.random.key(0)):
    ...     bool((dropout(jnp.ones(100), 0.5, "site") == 0).any())
    True
    """
    with contextlib.ExitStack() as marks:
        scope = None
        if key is not None:
            is_traced = _is_traced(key)
            scope = _Scope(key, is_traced, get_opaque_trace_state(), Counter(), marks)
            # Outside of any trace one mark serves all keys; otherwise an eager call would recompile each operation.
            marks.enter_context(_trace_mark(object() if is_traced else "concrete key"))
        else:
            marks.enter_context(_trace_mark(None))
        token = _scope.set(scope)
        try:
            yield
        finally:
            _scope.reset(token)


_adapter_rate: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("melora_adapter_rate", default=None)


@contextlib.contextmanager
def adapter_dropout(rate: jax.Array | None) -> Iterator[None]:
    """A context manager inside which adapters drop at `rate`, which may be traced; None leaves them their own rates.

    If a traced rate is a multiple of 1/65536, its masks are bit-identical to those of the same rate as a float.
    """
    token = _adapter_rate.set(rate)
    try:
        yield
    finally:
        _adapter_rate.reset(token)


def adapter_rate(own: float) -> float | jax.Array:
    """The dropout rate of an adapter: the one set by `adapter_dropout`, or else its own."""
    rate = _adapter_rate.get()
    return own if rate is None else rate


@contextlib.contextmanager
def scanned_layers() -> Iterator[None]:
    """Around a `jax.lax.scan` over layers: sites inside may use a concrete key that was entered around the scan.

    The scan is traced for this call only. If the call itself is being traced for later ones, the key is still refused.
    """
    outer = _scope.get()
    fits = outer is not None and (outer.fits_traces or not _is_traced(outer.key))
    token = _scope.set(None if outer is None else dataclasses.replace(outer, fits_traces=fits))
    try:
        yield
    finally:
        _scope.reset(token)


@contextlib.contextmanager
def numbered_layer(number: jax.Array, name: str = "") -> Iterator[None]:
    """Around one layer of a stack whose layers share their paths: sites inside fold its number into their keys.

    If a site's path has "*" for the number, its mask is the one that the layer draws outside of a stack, where its path
    has the number itself.

    Args:
      number: the layer's number, an integer scalar, usually traced.
      name: distinguishes the layers that one trace runs, such as the number of the first that each stands for.
    """
    outer = _scope.get()
    if outer is None:
        yield
        return
    with contextlib.ExitStack() as marks:
        marks.enter_context(_trace_mark(object()))
        inner = {"trace": get_opaque_trace_state(), "marks": marks, "layer": number, "layer_name": name}
        token = _scope.set(dataclasses.replace(outer, **inner))
        try:
            yield
        finally:
            _scope.reset(token)


def _is_traced(key: jax.Array) -> bool:
    """Whether the key is traced, or would be if it were used here: cloning makes a tracer of it inside a trace."""
    return isinstance(jax.random.clone(key), Tracer)


def key_for_site(path: str) -> jax.Array | None:
    """The key of the next draw at `path`, or `None` in evaluation.

    It folds into the entered key, in this order: crc32 of the path with "*" for its numbers; the numbers; how often the
    site has drawn before in this pass (a shared layer is called twice), if it has; and the number of the layer in force
    (see `numbered_layer`), unless a "*" in the path has taken it.

    Raises:
      ValueError: a function is being traced here for later calls too, and the key was entered around it.
    """
    scope = _scope.get()
    if scope is None:
        return None
    parts = path.split("/")
    template = "/".join("*" if part.isdigit() else part for part in parts)
    key = jax.random.fold_in(scope.key, zlib.crc32(template.encode()))
    if isinstance(key, Tracer) and not scope.fits_traces:
        raise ValueError(
            f"dropout at {path or 'a layer'}: the key was entered around a jitted, rematerialised or scanned function, "
            "which would reuse this one mask; jit a function that takes the key and enters dropout_key(key)"
        )
    for part in parts:
        if part.isdigit():
            key = jax.random.fold_in(key, int(part))
        elif part == "*" and scope.layer is not None:
            key = jax.random.fold_in(key, scope.layer)
    if scope.trace != get_opaque_trace_state():
        scope.marks.enter_context(_trace_mark(object()))  # another call of this inner function draws another mask
    name = path.replace("*", scope.layer_name)
    repeat = scope.draws[name]
    scope.draws[name] += 1
    key = jax.random.fold_in(key, repeat) if repeat else key
    return key if scope.layer is None or "*" in parts else jax.random.fold_in(key, scope.layer)


def dropout(x: jax.Array, rate: float | jax.Array, path: str) -> jax.Array:
    """Zeroes entries of `x` with probability `rate` and scales the rest by `1 / (1 - rate)`.

    Args:
      x: an array of any shape and floating dtype.
      rate: a probability in [0, 1), possibly traced. It is rounded to a multiple of 1/65536, in the scale too.
      path: the site's path in the model, which selects its random stream.

    Returns:
      An array of the shape and dtype of `x`; `x` itself if `rate` is 0 or no key is entered.

    Raises:
      ValueError: the key was entered around a function that is being traced here for later calls too.

    >>> import jax.numpy as jnp
    >>> dropout(jnp.ones(3), 0.5, "encoder/layer/0").tolist()
    [1.0, 1.0, 1.0]
    """
    keep = keep_mask(x.shape, rate, path)
    return x if keep is None else drop(x, keep, rate)


def keep_mask(shape: tuple[int, ...], rate: float | jax.Array, path: str) -> jax.Array | None:
    """Which entries dropout at the site `path` keeps, bool of `shape`; None if it keeps all. See `dropout`."""
    key = None if not isinstance(rate, jax.Array) and rate == 0.0 else key_for_site(path)
    if key is None:
        return None
    return _random_levels(key, shape) >= _dropped_levels(rate)


def drop(x: jax.Array, keep: jax.Array, rate: float | jax.Array) -> jax.Array:
    """`x` with zeros where `keep` is False, and the other entries scaled by `1 / (1 - rate)`."""
    # In bfloat16 the scale would be rounded, and all kept entries with it in one direction.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kept = _LEVELS - _dropped_levels(rate)
    scale = _LEVELS / (kept.astype(wide) if isinstance(kept, jax.Array) else kept)
    return jnp.where(keep, (x.astype(wide) * scale).astype(x.dtype), jnp.zeros((), x.dtype))


def rounded_rate(rate: float) -> float:
    """The rate at which dropout at `rate` works: the nearest multiple of 1/65536, exact in float32."""
    return _dropped_levels(rate) / _LEVELS


@overload
def _dropped_levels(rate: float) -> int: ...
@overload
def _dropped_levels(rate: jax.Array) -> jax.Array: ...
def _dropped_levels(rate: float | jax.Array) -> int | jax.Array:
    if isinstance(rate, jax.Array):
        return jnp.minimum(jnp.round(rate * _LEVELS), _LEVELS - 1).astype(jnp.int32)
    return min(round(rate * _LEVELS), _LEVELS - 1)


def _random_levels(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint16 of `shape`: each entry is a hash of the key, its row and its column."""
    words = jax.random.key_data(key).reshape(-1)
    rows = jnp.arange(math.prod(shape[:-1]), dtype=jnp.uint32).reshape(*shape[:-1], *[1] * min(len(shape), 1))
    columns = jnp.arange(*shape[-1:] or (1,), dtype=jnp.uint32)
    places = _scrambled(rows ^ words[0]) ^ _scrambled(columns ^ words[-1])
    return (_scrambled(places) >> 16).astype(jnp.uint16).reshape(shape)


def _scrambled(x: jax.Array) -> jax.Array:
    """A bijection of uint32 that flips about half of the output bits if one input bit changes.

    Source: lowbias32, C. Wellons.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
