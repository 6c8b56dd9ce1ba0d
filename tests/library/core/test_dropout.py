"""Dropout: its law, where its keys come from, and that no mask or tracer outlives the call it was drawn for."""

from __future__ import annotations

import contextlib
import functools
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.core.dropout import _random_levels, dropout, key_for_site, numbered_layer

pytestmark = pytest.mark.versions

KEY = jax.random.key(7)


@functools.partial(jax.jit, static_argnums=(2, 3))
def dropped(key: Any, x: Any, rate: float, path: str = "site") -> Any:
    with mj.dropout_key(key):
        return dropout(x, rate, path)


def mask(key: Any = KEY, path: str = "site", shape: tuple[int, ...] = (31, 37)) -> np.ndarray:
    return np.asarray(dropped(key, jnp.ones(shape), 0.5, path)) != 0


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeroes_the_rate_and_keeps_the_mean(rate: float, dtype: Any) -> None:
    x = jnp.linspace(1.0, 2.0, 101 * 203).reshape(101, 203).astype(dtype)
    y = np.asarray(dropped(KEY, x, rate), np.float64)
    assert (y == 0).mean() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / y.size) ** 0.5)
    one_rounding = float(jnp.finfo(dtype).eps) / 2 + 1 / 65536 / (1 - rate)
    np.testing.assert_allclose(y[y != 0], np.asarray(x, np.float64)[y != 0] / (1 - rate), rtol=one_rounding)


def test_entries_are_independent() -> None:
    """Neither along an axis nor across axes may entries be correlated."""
    keep = mask(shape=(64, 3, 255)).astype(float) - 0.5
    for axis, shift in ((0, 1), (1, 1), (2, 1), (2, 2), (2, 127), (2, 128)):
        correlation = (keep * np.roll(keep, shift, axis)).mean() / 0.25
        assert abs(correlation) < 5 / keep.size**0.5, (axis, shift)
    assert abs(keep.mean((0, 1))).max() < 0.5 * 6 / (64 * 3) ** 0.5


def test_rectangles_of_entries_are_independent() -> None:
    """A place is hashed from its row's hash and its column's: the four corners of a rectangle have parts in common."""
    for seed in range(3):
        signs = np.where(mask(jax.random.key(seed), shape=(256, 512)), 1.0, -1.0)
        for rows, columns in ((1, 1), (1, 16), (2, 1), (16, 64), (128, 256)):
            corners = signs * np.roll(signs, rows, 0)
            corners = corners * np.roll(corners, columns, 1)
            assert abs(corners.mean()) < 5 / signs.size**0.5, (seed, rows, columns)
        # Any pair of rows, and any pair of columns, agrees about as often as not.
        for array in (signs, signs.T):
            agreement = array @ array.T / array.shape[1]
            np.fill_diagonal(agreement, 0)
            assert abs(agreement).max() < 6.5 / array.shape[1] ** 0.5
            assert (agreement**2).sum() / (len(array) * (len(array) - 1)) == pytest.approx(1 / array.shape[1], rel=0.05)


def test_sixteen_bits_of_an_entry_are_uniform() -> None:
    """Counted over steps and sites, as training draws them: every rate is met, and the masks of two keys differ."""
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, step), site) for step in range(16) for site in range(4)]
    levels = np.stack([np.asarray(_random_levels(key, (64, 257))) for key in keys]).reshape(len(keys), -1)
    for low in (0, 8):
        counts = np.bincount((levels >> low & 255).reshape(-1), minlength=256)
        expected = levels.size / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * (2 * 255) ** 0.5
    signs = np.where(levels >= 1 << 15, 1.0, -1.0)
    agreement = signs @ signs.T / signs.shape[1] - np.eye(len(keys))
    assert abs(agreement).max() < 5.5 / signs.shape[1] ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 0), (0, 3), (2, 3, 5)])
def test_every_shape_and_dtype_is_kept(shape: tuple[int, ...]) -> None:
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        y = dropped(KEY, jnp.ones(shape, dtype), 0.5)
        assert (y.shape, y.dtype) == (shape, dtype)


def test_the_mask_depends_on_key_and_path_alone() -> None:
    np.testing.assert_array_equal(mask(), mask())
    assert not np.array_equal(mask(), mask(jax.random.key(8)))
    assert not np.array_equal(mask(), mask(path="other"))
    assert not np.array_equal(mask(path="layer/3/a"), mask(path="layer/4/a"))
    assert not np.array_equal(mask(path="layer/3/a/4"), mask(path="layer/4/a/3"))
    np.testing.assert_array_equal(mask(jax.random.PRNGKey(7)), mask(jax.random.PRNGKey(7)))


def test_a_scanned_stack_can_derive_its_layers_keys_from_traced_numbers() -> None:
    template = jax.random.fold_in(KEY, zlib.crc32(b"layer/*/self"))

    @jax.jit
    def stacked(numbers: Any) -> Any:
        return jax.vmap(lambda number: jax.random.key_data(jax.random.fold_in(template, number)))(numbers)

    with mj.dropout_key(KEY):
        keys: list[Any] = [key_for_site(f"layer/{k}/self") for k in (0, 3, 11)]
    np.testing.assert_array_equal(np.stack([jax.random.key_data(key) for key in keys]), stacked(jnp.array([0, 3, 11])))


def test_a_numbered_layer_takes_its_place_in_the_path_or_the_last_place() -> None:
    def key(path: str, number: int | None = None) -> Any:
        with mj.dropout_key(KEY), numbered_layer(jnp.int32(number)) if number else contextlib.nullcontext():
            found: Any = key_for_site(path)
            return jax.random.key_data(found)

    np.testing.assert_array_equal(key("layer/*/self", 3), key("layer/3/self"))
    shared = jax.random.fold_in(jax.random.wrap_key_data(key("layer/self")), 3)
    np.testing.assert_array_equal(key("layer/self", 3), jax.random.key_data(shared))


def test_without_a_key_or_a_rate_nothing_is_done() -> None:
    x = jnp.ones(5)
    assert dropout(x, 0.5, "site") is x
    with mj.dropout_key(KEY):
        assert dropout(x, 0.0, "site") is x
        with mj.dropout_key(None):
            assert dropout(x, 0.5, "site") is x
        assert dropout(x, 0.5, "site") is not x
    assert dropout(x, 0.5, "site") is x


def test_an_error_inside_leaves_evaluation_mode() -> None:
    with pytest.raises(ZeroDivisionError), mj.dropout_key(KEY):
        raise ZeroDivisionError
    assert key_for_site("site") is None


def test_a_site_called_twice_draws_twice_and_a_new_pass_draws_the_same() -> None:
    @jax.jit
    def twice(key: Any, x: Any) -> Any:
        with mj.dropout_key(key):
            return dropout(x, 0.5, "site"), dropout(x, 0.5, "other"), dropout(x, 0.5, "site")

    first, other, second = twice(KEY, jnp.ones((31, 37)))
    np.testing.assert_array_equal(np.asarray(first) != 0, mask())
    np.testing.assert_array_equal(np.asarray(other) != 0, mask(path="other"))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, twice(KEY, jnp.ones((31, 37)))[2])


def test_the_gradient_passes_where_the_value_did() -> None:
    x = jnp.linspace(1.0, 2.0, 97)
    y = dropped(KEY, x, 0.25)
    gradient = jax.grad(lambda x: dropped(KEY, x, 0.25).sum())(x)
    np.testing.assert_allclose(gradient, np.asarray(y) / np.asarray(x), rtol=1e-6)


def inner_functions() -> dict[str, Any]:
    def block(x: Any) -> Any:
        return jnp.sin(dropout(x, 0.5, "block/0"))

    def scanned(x: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (block(carry), None), x, None, length=1)[0]

    return {"checkpoint": jax.checkpoint(block), "jit": jax.jit(block), "scan": jax.jit(scanned)}


@pytest.mark.parametrize("name", ["checkpoint", "jit", "scan"])
def test_functions_that_jax_caches_draw_anew_in_every_trace(name: str) -> None:
    """JAX keeps what an inner function traced to; another trace must get neither its key's tracer nor its mask."""
    inner, x = inner_functions()[name], jnp.linspace(1.0, 2.0, 97)

    def loss(x: Any, key: Any) -> Any:
        with mj.dropout_key(key):
            return inner(x).sum()

    outer = [jax.jit(jax.value_and_grad(lambda x, key: loss(x, key))) for _ in range(2)]
    results = [outer[k](x, jax.random.key(seed)) for k, seed in ((0, 1), (1, 1), (1, 2))]
    assert results[0][0] == results[1][0]
    assert results[1][0] != results[2][0]
    for value, gradient in results:
        kept = np.asarray(gradient) != 0
        assert 0.2 < kept.mean() < 0.8
        np.testing.assert_allclose(gradient, np.where(kept, 2 * np.cos(2 * x), 0), rtol=1e-5)
        np.testing.assert_allclose(value, np.where(kept, np.sin(2 * x), 0).sum(), rtol=1e-5)
    assert jax.jit(lambda x: inner(x).sum())(x) == pytest.approx(np.sin(x).sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["checkpoint", "jit"])
def test_a_cached_function_called_twice_in_one_trace_draws_twice(name: str) -> None:
    inner = inner_functions()[name]

    @jax.jit
    def twice(x: Any, key: Any) -> Any:
        with mj.dropout_key(key):
            return inner(x), inner(x)

    first, second = twice(jnp.ones(97), KEY)
    assert not np.array_equal(first, second)


def test_training_and_evaluation_are_not_answered_from_each_others_traces() -> None:
    inner, x = inner_functions()["jit"], jnp.ones(97)

    @jax.jit
    def both(key: Any, x: Any) -> Any:
        with mj.dropout_key(key):
            with mj.dropout_key(None):
                inside = inner(x)
            trained = inner(x)
        return trained, inside, inner(x)

    trained, inside, after = both(KEY, x)
    assert (np.asarray(trained) == 0).any()
    np.testing.assert_allclose(inside, np.sin(np.ones(97)), rtol=1e-6)
    np.testing.assert_array_equal(after, inside)


@pytest.mark.parametrize("name", ["checkpoint", "jit", "scan"])
def test_a_key_entered_around_a_compiled_function_is_refused(name: str) -> None:
    inner = inner_functions()[name]
    message = "dropout at block/0: the key was entered around a jitted, rematerialised or scanned function"
    for seed in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"), mj.dropout_key(jax.random.key(seed)):
            inner(jnp.ones(7))


def test_a_concrete_key_may_be_closed_over() -> None:
    @jax.jit
    def function(x: Any) -> Any:
        with mj.dropout_key(KEY):
            return dropout(x, 0.5, "site")

    np.testing.assert_array_equal(np.asarray(function(jnp.ones((31, 37)))) != 0, mask())


class Remat(nnx.Module):
    """A host that rematerialises its one layer, and calls it twice."""

    def __init__(self) -> None:
        self.layer = mj.MELoRADense(6, 6, n=2, dropout=0.5, path="layer", rngs=nnx.Rngs(0))
        self.layer.b[...] = jnp.ones_like(self.layer.b[...])

    @nnx.remat
    def once(self, x: Any) -> Any:
        return self.layer(x)

    def __call__(self, x: Any) -> Any:
        return self.once(self.once(x))


def test_an_adapter_under_nnx_remat_has_the_gradients_that_it_has_without() -> None:
    graphdef, trainable, rest = nnx.split(Remat(), nnx.Param, ...)
    x = jnp.linspace(-1.0, 1.0, 18).reshape(3, 6)

    def gradient(key: Any, forward: Any) -> Any:
        def loss(trainable: Any) -> Any:
            with mj.dropout_key(key):
                return (forward(nnx.merge(graphdef, trainable, rest, copy=True)) ** 2).sum()

        return jax.grad(loss)(trainable)

    remat = jax.jit(lambda key: gradient(key, lambda model: model(x)))
    plain = jax.jit(lambda key: gradient(key, lambda model: model.layer(model.layer(x))))
    for seed in (1, 2):
        key = jax.random.key(seed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), remat(key), plain(key))
    assert not np.array_equal(jax.tree.leaves(remat(KEY))[0], jax.tree.leaves(plain(jax.random.key(1)))[0])


def test_an_adapters_dropout_is_elementwise_on_its_input_alone() -> None:
    """Slices draw independently, as the authors' one Dropout a mini does; the base sees the whole input."""
    layer = mj.MELoRADense(40, 20, n=2, r=20, alpha=20.0, dropout=0.25, path="layer", rngs=nnx.Rngs(0))
    layer.base.kernel[...] *= 0
    layer.a[...] = jnp.broadcast_to(jnp.eye(20), (2, 20, 20))
    layer.b[...] = jnp.broadcast_to(jnp.eye(20)[:, :10], (2, 20, 10))

    @nnx.jit
    def forward(layer: Any, x: Any, key: Any) -> Any:
        with mj.dropout_key(key):
            return layer(x)

    y = np.asarray(forward(layer, jnp.ones((997, 40)), KEY))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / 0.75, rtol=1e-4)
    assert kept.mean() == pytest.approx(0.75, abs=0.02)
    one, other = kept[:, :10].astype(float) - 0.75, kept[:, 10:].astype(float) - 0.75
    assert abs((one * other).mean()) < 5 * 0.1875 / one.size**0.5
    layer.base.kernel[...] += 1.0
    layer.b[...] *= 0
    np.testing.assert_allclose(forward(layer, jnp.ones((3, 40)), KEY), 40.0)


def test_an_adapted_embeddings_dropout_drops_whole_tokens() -> None:
    layer = mj.MELoRADense.wrap(
        nnx.Embed(14, 6, rngs=nnx.Rngs(0)),
        mj.MELoRAConfig(n=2, r=1, dropout=0.5, targets=["embed"]).spec("embed"),
        path="embed",
        rngs=nnx.Rngs(1),
    )
    layer.b[...] = jnp.ones_like(layer.b[...])
    ids = np.arange(14).repeat(30)

    @nnx.jit
    def forward(layer: Any, key: Any) -> Any:
        with mj.dropout_key(key):
            return layer(ids) - layer.base(ids)

    update, whole = np.asarray(forward(layer, KEY)), np.asarray(layer.delta())[ids]
    kept = (update != 0).any(-1)
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(update, np.where(kept[:, None], 2 * whole, 0), rtol=1e-5, atol=1e-5)
