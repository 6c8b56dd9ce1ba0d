"""Populations: each member equals its lone run, whatever the members differ in, and one product serves all of them."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.core.dropout import dropout
from melora_jax.training import make_members, make_population_eval, make_population_step, member_state, population_state
from tests.support import tiny

STEPS, ROWS, LENGTH = 50, 6, 5
# (seed, learning rate, alpha, dropout) of each member, the first that of the model: alphas that are and are not a power
# of two times its own, a rate of 0 among others, two members that differ in the learning rate alone.
FIRST = (3, 4e-3, 16.0, 0.3)
VARIED = {
    "seed": (FIRST, (5, 4e-3, 16.0, 0.3)),
    "learning rate": (FIRST, (3, 2e-3, 16.0, 0.3)),
    "alpha": (FIRST, (3, 4e-3, 12.0, 0.3)),
    "dropout": (FIRST, (3, 4e-3, 16.0, 0.05)),
    "all": (FIRST, (5, 2e-3, 12.0, 0.0), (5, 4e-3, 12.0, 0.0), (11, 7e-3, 32.0, 0.05)),
}


def start(seed: int, alpha: float = 16.0, rate: float = 0.3, **changes: Any) -> Any:
    """The model of a member's lone run: the base is the same for all, the head and the factors are the seed's."""
    model = tiny.Encoder(0, layers=1)
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


@functools.cache
def together(varied: str, streams: Any, accumulate: int, strategy: str, at_once: int | None) -> Any:
    """The trainables of each member, [steps, m] losses, and the frozen state before and after."""
    seeds, rates, alphas, dropouts = zip(*VARIED[varied], strict=True)
    model = start(seeds[0], strategy=strategy)
    members = make_members(
        [key_of(seed) for seed in seeds],
        optim={"rate": rates},
        alpha=[alpha / 16.0 for alpha in alphas] if len(set(alphas)) > 1 else None,
        dropout=dropouts if len(set(dropouts)) > 1 else None,
    )

    def own_tx(optim: Any) -> optax.GradientTransformation:
        return make_tx(model, optim["rate"])

    state, frozen = population_state((start(seed, strategy=strategy) for seed in seeds), own_tx, members)
    step = make_population_step(model, own_tx, loss, streams=streams, accumulate=accumulate, at_once=at_once)
    before, losses = flat(frozen), []
    for number in range(STEPS):
        batches = [batch_of(member if streams == "own" else 0, number) for member in range(len(seeds))]
        batch = batches[0] if streams == "shared" else jax.tree.map(lambda *x: np.stack(x), *batches)
        state, metrics = step(state, frozen, batch, members)
        losses.append(np.asarray(metrics["loss"]))
    assert int(state.step) == STEPS
    tiny.assert_equal(flat(frozen), before)
    return [flat(member_state(state, member).trainable) for member in range(len(seeds))], np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("varied", "streams", "accumulate", "strategy", "at_once"),
    [(varied, "shared", 1, "packed", None) for varied in VARIED]
    + [("all", "own", 3, "batched", None), ("all", "own", 3, "batched", 3)],
)
def test_each_member_equals_its_lone_run(
    varied: str, streams: Any, accumulate: int, strategy: str, at_once: int | None
) -> None:
    trainables, losses = together(varied, streams, accumulate, strategy, at_once)
    for member, settings in enumerate(VARIED[varied]):
        wanted, wanted_losses = lone(*settings, member if streams == "own" else 0, accumulate, strategy)
        found = trainables[member]
        assert list(found) == list(wanted)
        for path, value in wanted.items():
            np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-5, err_msg=f"{path} of {member}")
        np.testing.assert_allclose(losses[:, member], wanted_losses, rtol=1e-5)


@pytest.mark.parametrize("varied", VARIED)
def test_what_members_differ_in_makes_a_difference(varied: str) -> None:
    """Far more than rounding, or the test above could not fail."""
    trainables, _ = together(varied, "shared", 1, "packed", None)
    for number, one in enumerate(trainables):
        for other in trainables[:number]:
            for path in ("classifier/kernel", "layer/0/query/a", "layer/0/value/b"):
                assert abs(one[path] - other[path]).max() > 3e-4, path


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 1 / 3, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_traced_rate_drops_the_same_entries_bit_for_bit(rate: float, dtype: Any) -> None:
    x = jnp.linspace(-2.0, 3.0, 31 * 37).reshape(31, 37).astype(dtype)
    members = make_members([key_of(1)], dropout=[rate])
    assert members.dropout is not None

    def dropped(rate: Any) -> jax.Array:
        with mj.dropout_key(key_of(1)):
            return dropout(x, rate, "site")

    traced = jax.jit(jax.vmap(dropped))(members.dropout)[0]
    assert np.asarray(traced).tobytes() == np.asarray(jax.jit(lambda: dropped(rate))()).tobytes()


def products(text: str) -> list[str]:
    """The operand types of each product in a StableHLO text."""
    return [f"{a} {b}" for a, b in re.findall(r"dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)]


@pytest.mark.parametrize("strategy", ["packed", "batched"])
def test_one_product_with_the_frozen_kernel_serves_all_members(strategy: str) -> None:
    """No loop over members, no kernel a member, and as many products as a lone step has."""
    count = 7
    models = [start(seed, strategy=strategy) for seed in range(count)]
    tx = mj.make_optimizer(models[0], 1e-3)
    members = make_members([key_of(seed) for seed in range(count)], dropout=[0.1] * count)
    state, frozen = population_state(models, tx, members)
    batch = batch_of(0, 0)
    text = make_population_step(models[0], tx, loss).lower(state, frozen, batch, members).as_text()
    lone_step = mj.make_train_step(models[0], tx, loss)
    lone_text = lone_step.lower(member_state(state, 0), frozen, batch, members.key[0]).as_text()
    assert len(products(text)) == len(products(lone_text)) > 0
    # "while" stands in both for the rounds of the random bits' hash at most
    assert text.count("stablehlo.while") == lone_text.count("stablehlo.while")
    kernel, rows = f"{tiny.INNER}x{tiny.WIDTH}xf32", f"{count}x{ROWS}x{LENGTH}x{tiny.INNER}xf32"
    assert f"{rows} {kernel}" in products(text)  # the second kernel, after the first adapters
    for shape in (kernel, f"{tiny.WIDTH}x{tiny.INNER}xf32"):
        assert f"tensor<{count}x{shape}>" not in text
    # before the first adapter nothing differs, so its input is the rows of one member
    assert f"{ROWS}x{LENGTH}x{tiny.WIDTH}xf32 {tiny.WIDTH}x{tiny.INNER}xf32" in products(text)


def test_evaluation_has_each_members_alpha_and_no_dropout() -> None:
    settings = VARIED["all"]
    seeds, _, alphas, dropouts = zip(*settings, strict=True)
    members = make_members([key_of(s) for s in seeds], alpha=[a / 16.0 for a in alphas], dropout=dropouts)
    models = [tiny.stirred(start(seed)) for seed in seeds]
    state, frozen = population_state(models, optax.identity(), members)
    ids = batch_of(0, 0)["ids"]
    found = make_population_eval(models[0], lambda model, ids: model(ids))(state, frozen, ids, members)
    for member, (seed, _, alpha, _) in enumerate(settings):
        wanted = tiny.run(tiny.stirred(start(seed, alpha)), ids)
        np.testing.assert_allclose(found[member], wanted, rtol=1e-5, atol=1e-6)


def test_what_is_no_population_is_refused() -> None:
    keys = [key_of(1), key_of(2)]
    model = start(1)
    tx = mj.make_optimizer(model, 1e-3)
    for message, make in {
        "a population of no members; give one key a member": lambda: make_members([]),
        "alpha has shape (3,) for 2 members; give one number a member": lambda: make_members(keys, alpha=[1, 1, 1]),
        "rate has shape (1,) for 2 members; give one number a member": lambda: make_members(
            keys, optim={"rate": [1e-3]}
        ),
        "alpha=-1.0 must be a number above 0": lambda: make_members(keys, alpha=[-1, 2]),
        "dropout=1.0 must be a number at least 0 and below 1": lambda: make_members(keys, dropout=[0.0, 1.0]),
        "1 models for 2 members; give one adapted model a member": lambda: population_state(
            [model], tx, make_members(keys)
        ),
        "model 1 differs from model 0 in the shape or presence of layer/0/query/a; members may differ in start, alpha "
        "and dropout, but not in n, r, targets or modules_to_save": lambda: population_state(
            [model, start(2, r=1)], tx, make_members(keys)
        ),
        "streams='mine' is unknown; choose shared or own": lambda: make_population_step(
            model, tx, loss, streams="mine"
        ),
        "at_once=0 must be a whole number of at least 1": lambda: make_population_step(model, tx, loss, at_once=0),
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            make()


@pytest.mark.parametrize("settings", [{"init": "pissa"}, {"variant": "adalora"}])
def test_members_share_alpha_where_it_is_more_than_a_factor_of_the_update(settings: Any) -> None:
    models, tx = [start(seed, rate=0.0, r=2, **settings) for seed in (1, 2)], optax.sgd(0.1)
    members = make_members([key_of(1), key_of(2)], alpha=[1.0, 2.0])
    state, frozen = population_state(models, tx, members)
    word = next(iter(settings))
    with pytest.raises(ValueError, match=rf"^{word}='.*' at layer/0/query: members of a population must share alpha"):
        make_population_step(models[0], tx, loss)(state, frozen, batch_of(0, 0), members)


def test_members_share_one_base() -> None:
    other = start(2)
    other.embed.embedding[...] += 1.0
    members = make_members([key_of(1), key_of(2)])
    message = "the base of model 1 differs from that of model 0 at embed/embedding; members share one base"
    with pytest.raises(ValueError, match=f"^{message}$"):
        population_state([start(1), other], mj.make_optimizer(other, 1e-3), members)


def test_members_share_the_base_where_a_lone_run_would_merge() -> None:
    def losses(strategy: Any) -> np.ndarray:
        layers = [mj.MELoRADense(21, 33, n=3, r=7, strategy=strategy, rngs=nnx.Rngs(0)) for _ in range(2)]
        assert layers[0].strategy == ("merged" if strategy == "auto" else strategy)
        members = make_members([key_of(1), key_of(2)], dropout=[0.0, 0.5])
        state, frozen = population_state(layers, optax.sgd(0.1), members)
        step = make_population_step(layers[0], optax.sgd(0.1), lambda layer, x: (layer(x) ** 2).mean())
        x = jax.random.normal(key_of(3), (300, 21))
        for _ in range(3):  # B is zero at first
            state, metrics = step(state, frozen, x, members)
        return np.asarray(metrics["loss"])

    auto = losses("auto")
    np.testing.assert_array_equal(auto, losses("batched"))
    assert auto[0] != auto[1]
    layer = mj.MELoRADense(21, 33, n=3, r=7, strategy="merged", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r'strategy="merged" at .* would form W \+ ΔW for each member'):
        make_population_step(layer, optax.sgd(0.1), lambda layer, x: layer(x).mean())
