"""Populations: each member equals its lone run, whatever the members differ in, and one product serves all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

import melora_jax as mj

STEPS, ROWS, LENGTH = 50, 6, 5
# One of each: a rate 0 among others, an alpha that is no power of two times the model's 16, a learning rate apart.
SEEDS, RATES, ALPHAS, DROPOUTS = (
    (3, 5, 5, 11),
    (4e-3, 2e-3, 4e-3, 7e-3),
    (16.0, 12.0, 32.0, 16.0),
    (0.3, 0.0, 0.3, 0.05),
)
BASE = {"seeds": (3,) * 4, "rates": (4e-3,) * 4, "alphas": (16.0,) * 4, "dropouts": (0.3,) * 4}
VARIED = {
    "seed": {"seeds": SEEDS},
    "learning rate": {"rates": RATES},
    "alpha": {"alphas": ALPHAS},
    "dropout": {"dropouts": DROPOUTS},
    "all": {"seeds": SEEDS, "rates": RATES, "alphas": ALPHAS, "dropouts": DROPOUTS},
}


def start(seed: int, alpha: float = 16.0, rate: float = 0.3, **changes: Any) -> Any:
    """The model of a member's lone run: the base is the same for all, the head and the factors are the seed's."""
    model = tiny.Encoder(0)
    model.classifier.kernel[...] = nnx.initializers.normal(0.3)(jax.random.key(seed), (tiny.WIDTH, tiny.LABELS))
    settings = {"alpha": alpha, "dropout": rate, "r": 2, "strategy": "packed"} | changes
    mj.adapt(model, tiny.config(**settings), rngs=nnx.Rngs(seed))
    return model


def key_of(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), 2)


def make_tx(model: Any, rate: Any) -> optax.GradientTransformation:
    """The schedule, the clipping and the rates of a run, from one number."""
    schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, 5), optax.linear_schedule(rate, 0.0, STEPS)], [5])
    return mj.make_optimizer(model, schedule, head_learning_rate=rate / 2, clip_norm=1.0)


def loss(model: Any, batch: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["ids"]), batch["labels"])
    weight = batch["weight"].sum()
    return (losses * batch["weight"]).sum() / weight, {"weight": weight}


@functools.cache
def batch_of(stream: int, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([stream, step])
    ids = rng.integers(0, tiny.VOCAB, (ROWS, LENGTH))
    return {
        "ids": ids,
        "labels": (ids.sum(1) % tiny.LABELS).astype(np.int32),
        "weight": np.array([1, 1, 1, 0, 1, 1], np.float32)[rng.permutation(ROWS)],
    }


@functools.cache
def lone(seed: int, rate: float, alpha: float, drop: float, stream: int, accumulate: int, strategy: str) -> Any:
    """The trainables and the losses of one run of its own."""
    model = start(seed, alpha, drop, strategy=strategy)
    tx = make_tx(model, rate)
    step = mj.make_train_step(model, tx, loss, accumulate=accumulate)
    (state, frozen), losses = mj.train_state(model, tx), []
    for number in range(STEPS):
        state, metrics = step(state, frozen, batch_of(stream, number), key_of(seed))
        losses.append(float(metrics["loss"]))
    return flat(state.trainable), losses


def flat(trainable: Any) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.array(x.get_value()) for path, x in nnx.to_flat_state(trainable)}


@pytest.mark.parametrize("varied", VARIED)
@pytest.mark.parametrize("streams", ["shared", "own"])
@pytest.mark.parametrize(("accumulate", "strategy"), [(1, "packed"), (3, "batched")])
def test_each_member_equals_its_lone_run(varied: str, streams: Any, accumulate: int, strategy: str) -> None:
    seeds, rates, alphas, dropouts = (BASE | VARIED[varied]).values()
    model = start(seeds[0], strategy=strategy)
    members = mj.make_members(
        [key_of(seed) for seed in seeds],
        optim={"rate": rates},
        alpha=[alpha / 16.0 for alpha in alphas] if len(set(alphas)) > 1 else None,
        dropout=dropouts if len(set(dropouts)) > 1 else None,
    )
    factory = lambda optim: make_tx(model, optim["rate"])  # noqa: E731
    state, frozen = mj.population_state((start(seed, strategy=strategy) for seed in seeds), factory, members)
    step = mj.make_population_step(model, factory, loss, streams=streams, accumulate=accumulate)
    losses = []
    for number in range(STEPS):
        batches = [batch_of(member if streams == "own" else 0, number) for member in range(4)]
        batch = batches[0] if streams == "shared" else jax.tree.map(lambda *x: np.stack(x), *batches)
        state, metrics = step(state, frozen, batch, members)
        losses.append(np.asarray(metrics["loss"]))
    for member in range(4):
        settings = seeds[member], rates[member], alphas[member], dropouts[member]
        wanted, wanted_losses = lone(*settings, member if streams == "own" else 0, accumulate, strategy)
        found = flat(mj.member_state(state, member).trainable)
        assert list(found) == list(wanted)
        for path, value in wanted.items():
            np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-5, err_msg=f"{path} of {member}")
        np.testing.assert_allclose([one[member] for one in losses], wanted_losses, rtol=1e-5)
    assert int(state.step) == STEPS
