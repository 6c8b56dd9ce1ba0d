"""The optimizer against AdamW in NumPy, what it trains, and the step: accumulation, donation, reproducibility."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.training.optimizer import labels_of
from tests.support import reference, tiny

pytestmark = pytest.mark.versions

KEY = jax.random.key(3)
LABELS = jnp.array([2, 0])
BATCH = {"ids": tiny.IDS, "labels": LABELS, "weight": jnp.ones(2)}
RATES: dict[str, Any] = {"learning_rate": 1e-2, "b_learning_rate": 1e-1, "head_learning_rate": 1e-3}
SPLIT = {"a": 1e-2, "b": 1e-1, "head": 1e-3}


def loss(model: Any, batch: Any) -> Any:
    """The mean cross-entropy over rows of weight 1, NaN if there are none."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["ids"]), batch["labels"])
    weight = batch["weight"].sum()
    return (losses * batch["weight"]).sum() / weight, {"weight": weight, "correct": (batch["labels"] > 0).sum()}


def label_of(path: str) -> str:
    last = path.rpartition("/")[2]
    return last if last in ("a", "b") else "head"


@functools.cache
def built(dropout: float = 0.0, accumulate: int = 1, clip_norm: float | None = None) -> Any:
    model = tiny.adapted(r=[1, 2], dropout=dropout)
    tx = mj.make_optimizer(model, **RATES, weight_decay=0.1, clip_norm=clip_norm)
    return tx, mj.make_train_step(model, tx, loss, accumulate=accumulate)


def begun(**options: Any) -> Any:
    """A fresh state, the frozen base and the step, compiled once for each set of options."""
    tx, step = built(**options)
    return *mj.train_state(tiny.adapted(r=[1, 2], dropout=options.get("dropout", 0.0)), tx), step


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_labels_of_the_whole_model() -> None:
    model = tiny.adapted(targets=["0.query"])
    labels = nnx.to_flat_state(labels_of(model)(nnx.state(model)))
    assert {"/".join(map(str, path)): label.get_raw_value() for path, label in labels} == {
        "classifier/bias": "head",
        "classifier/kernel": "head",
        "embed/embedding": "frozen",
        "layer/0/out/kernel": "frozen",
        "layer/0/query/a": "a",
        "layer/0/query/b": "b",
        "layer/0/query/base/bias": "frozen",
        "layer/0/query/base/kernel": "frozen",
        "layer/0/value/bias": "frozen",
        "layer/0/value/kernel": "frozen",
        "layer/1/out/kernel": "frozen",
        "layer/1/query/bias": "frozen",
        "layer/1/query/kernel": "frozen",
        "layer/1/value/bias": "frozen",
        "layer/1/value/kernel": "frozen",
    }


def test_another_models_tree_is_refused() -> None:
    tx = mj.make_optimizer(tiny.adapted(), 1e-3)
    other = tiny.adapted(targets=["out"])
    with pytest.raises(
        ValueError, match=r"^layer/0/out/a is not a variable of the model that the optimizer was made for; "
    ):
        tx.init(nnx.state(other, nnx.Param))


def test_three_steps_are_adamw_with_each_kinds_own_rate() -> None:
    state, frozen, step = begun()
    model = tiny.adapted(r=[1, 2])
    graphdef, _, _ = nnx.split(model, nnx.Param, ...)
    rest = frozen
    start = {path: np.array(value) for path, value in flat(state.trainable).items()}
    seen: dict[str, list[np.ndarray]] = {path: [] for path in start}

    @jax.jit
    def gradient(trainable: Any) -> Any:
        return jax.grad(lambda t: loss(nnx.merge(graphdef, t, rest, copy=True), BATCH)[0])(trainable)

    for _ in range(3):
        grads = gradient(state.trainable)
        for path, value in flat(grads).items():
            seen[path].append(np.array(value, np.float64))
        norm = np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)))
        state, metrics = step(state, frozen, BATCH, KEY)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for path, value in flat(state.trainable).items():
        expected = reference.adamw(start[path], seen[path], SPLIT[label_of(path)], weight_decay=0.1)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=2e-6, err_msg=path)
        assert abs(np.asarray(value) - start[path]).max() > 0.5 * SPLIT[label_of(path)], path
    assert int(state.step) == 3


def flat(tree: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): variable[...] for path, variable in nnx.to_flat_state(tree)}


def test_a_schedule_is_followed_by_each_kind() -> None:
    model = tiny.adapted()
    tx = mj.make_optimizer(model, lambda count: 0.1 * (count == 1), weight_decay=0.0)
    trainable = nnx.state(model, nnx.Param)
    ones = jax.tree.map(jnp.ones_like, trainable)
    opt_state, sizes = tx.init(trainable), []
    for _ in range(3):
        updates, opt_state = tx.update(ones, opt_state, trainable)
        sizes.append(max(abs(np.asarray(leaf)).max() for leaf in jax.tree.leaves(updates)))
    assert sizes == [0.0, pytest.approx(0.1, rel=1e-4), 0.0]


def test_nnx_optimizer_trains_adapters_and_head_alone() -> None:
    model = tiny.adapted(r=[1, 2])
    before = tiny.arrays(model)
    optimizer = nnx.Optimizer(model, mj.make_optimizer(model, **RATES, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def update(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(lambda model: loss(model, BATCH)[0])(model))

    update(model, optimizer)
    after = tiny.arrays(model)
    moved = {path for path, value in after.items() if value.tobytes() != before[path].tobytes()}
    assert moved == {path for path in before if path.endswith(("/a", "/b")) or path.startswith("classifier/")}
    state, frozen, step = begun()
    state, _ = step(state, frozen, BATCH, KEY)
    for path, value in flat(state.trainable).items():
        np.testing.assert_allclose(after[path], value, rtol=1e-5, atol=1e-7, err_msg=path)


def test_a_whole_tree_callers_frozen_leaves_get_no_update_no_state_and_no_say_in_the_clipping() -> None:
    model = tiny.adapted()
    tx = mj.make_optimizer(model, 1e-2, clip_norm=1.0, weight_decay=0.1)
    whole, trainable = nnx.state(model), nnx.state(model, nnx.Param)
    steep = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e6), whole)
    part = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e6), trainable)
    opt_state = tx.init(whole)
    sizes = [leaf.size for leaf in jax.tree.leaves(opt_state)]
    assert sum(sizes) - len([size for size in sizes if size == 1]) <= 2 * sum(
        v.size for v in jax.tree.leaves(trainable)
    )
    assert bits(opt_state) == bits(tx.init(trainable))
    all_updates = flat(tx.update(steep, opt_state, whole)[0])
    own_updates = flat(tx.update(part, tx.init(trainable), trainable)[0])
    for path, update in all_updates.items():
        if path in own_updates:
            assert np.asarray(update).tobytes() == np.asarray(own_updates[path]).tobytes(), path
        else:
            assert not np.asarray(update).any(), path


def test_clipping_bounds_the_norm_of_all_trainables_together() -> None:
    """Adam forgets a gradient's length, so the bound shows in its second moment."""
    model = tiny.adapted()
    trainable = nnx.state(model, nnx.Param)
    tx = mj.make_optimizer(model, 1e-2, clip_norm=0.5)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3.0), trainable)
    _, opt_state = tx.update(grads, tx.init(trainable), trainable)
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    squares = [leaf for path, leaf in leaves if ".nu" in jax.tree_util.keystr(path)]
    assert sum(np.asarray(leaf).sum() for leaf in squares) / (1 - 0.999) == pytest.approx(0.5**2, rel=1e-4)


def test_the_base_is_bitwise_unchanged_and_the_state_is_donated() -> None:
    state, frozen, step = begun()
    model = tiny.adapted(r=[1, 2])
    before, old = bits(frozen), jax.tree.leaves(state.trainable)
    for _ in range(3):
        state, _ = step(state, frozen, BATCH, KEY)
    assert bits(frozen) == before == bits(nnx.state(model, mj.FrozenParam))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    nnx.update(model, state.trainable)
    tiny.assert_equal(tiny.arrays(mj.unwrap(model).layer), tiny.arrays(tiny.Encoder().layer))


def test_padding_of_narrower_minis_stays_as_it_is() -> None:
    state, frozen, step = begun()
    for _ in range(2):
        state, _ = step(state, frozen, BATCH, KEY)
    start, now = tiny.adapted(r=[1, 2]).layer[0].query, state.trainable["layer"][0]["query"]
    decay = (1 - 1e-2 * 0.1) ** 2
    np.testing.assert_allclose(now["a"][0, :, 1], np.asarray(start.a[0, :, 1]) * decay, rtol=1e-5)
    assert abs(now["a"][0, :, 0] - start.a[0, :, 0] * decay).min() > 1e-3


def test_a_step_repeats_from_key_and_number_and_its_masks_differ_from_the_next() -> None:
    runs = []
    for key in (KEY, KEY, jax.random.key(4)):
        state, frozen, step = begun(dropout=0.5)
        runs.append(bits(step(state, frozen, BATCH, key)[0]))
    assert runs[0] == runs[1] != runs[2]
    losses = []
    for number in (0, 1, 0):
        state, frozen, step = begun(dropout=0.5)
        losses.append(float(step(state._replace(step=jnp.int32(number)), frozen, BATCH, KEY)[1]["loss"]))
    assert losses[0] == losses[2] != losses[1]


def test_going_on_after_a_rebuild_is_bitwise_going_on() -> None:
    state, frozen, step = begun(dropout=0.5)
    for _ in range(4):
        state, _ = step(state, frozen, BATCH, KEY)
    whole = bits(state)
    state, frozen, step = begun(dropout=0.5)
    for _ in range(2):
        state, _ = step(state, frozen, BATCH, KEY)
    saved = jax.tree.map(np.array, state)
    built.cache_clear()
    fresh, frozen, step = begun(dropout=0.5)
    state = jax.tree.unflatten(jax.tree.structure(fresh), map(jnp.asarray, jax.tree.leaves(saved)))
    for _ in range(2):
        state, _ = step(state, frozen, BATCH, KEY)
    assert bits(state) == whole


ROWS = {
    "ids": jnp.asarray(np.random.default_rng(5).integers(0, tiny.VOCAB, (6, 4))),
    "labels": jnp.array([0, 1, 2, 0, 1, 2]),
}


@pytest.mark.parametrize("weight", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 0]])
def test_accumulating_equals_one_big_batch_however_rows_are_padded(weight: list[int]) -> None:
    """Also with a micro-batch of padding alone, whose mean loss is not a number."""
    batch = ROWS | {"weight": jnp.array(weight, jnp.float32)}
    results = []
    for accumulate in (1, 3):
        state, frozen, step = begun(accumulate=accumulate)
        state, metrics = step(state, frozen, batch, KEY)
        results.append((flat(state.trainable), metrics))
    (one, metrics), (three, accumulated) = results
    for path, value in one.items():
        np.testing.assert_allclose(three[path], value, rtol=1e-4, atol=1e-6, err_msg=path)
    for name in ("loss", "weight", "grad_norm"):
        assert accumulated[name] == pytest.approx(float(metrics[name]), rel=1e-5), name
        assert accumulated[name].dtype == jnp.float32
    assert int(metrics["weight"]) == sum(weight)


def test_metrics_are_averaged_by_weight_whatever_their_type() -> None:
    batch = ROWS | {"weight": jnp.array([1, 1, 1, 0, 0, 0], jnp.float32)}
    state, frozen, step = begun(accumulate=3)
    correct = step(state, frozen, batch, KEY)[1]["correct"]
    assert correct == pytest.approx((2 * 1 + 1 * 1) / 3)  # 1 of two labels above 0 in each micro-batch that counts


def test_micro_batches_draw_different_masks() -> None:
    same = {"ids": jnp.tile(tiny.IDS[:1], (6, 1)), "labels": jnp.zeros(6, jnp.int32), "weight": jnp.ones(6)}

    def with_square(model: Any, batch: Any) -> Any:
        value, _ = loss(model, batch)
        return value, {"square": value**2}

    model = tiny.adapted(dropout=0.5)
    tx = mj.make_optimizer(model, 1e-3)
    _, metrics = mj.make_train_step(model, tx, with_square, accumulate=3)(*mj.train_state(model, tx), same, KEY)
    assert metrics["square"] > 1.001 * metrics["loss"] ** 2  # equal if all three losses were


def test_micro_batches_must_divide_the_batch() -> None:
    state, frozen, step = begun(accumulate=4)
    with pytest.raises(
        ValueError, match=r"^accumulate=4 does not divide the batch of 6 rows; choose a divisor, or pad(\n|$)"
    ):
        step(state, frozen, ROWS | {"weight": jnp.ones(6)}, KEY)
    with pytest.raises(ValueError, match=r"^accumulate=0 must be a whole number of at least 1$"):
        begun(accumulate=0)
