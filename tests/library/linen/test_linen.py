"""Laws of adapted Linen models: NumPy and the NNX path as oracles, zero start, merging, counts, training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import melora_jax as mj
from melora_jax import linen
from melora_jax.checkpoints.native_format import read_adapter, write_adapter
from tests.library.linen.linen_hosts import ALPHA, Host, R, flat_delta, stirred
from tests.support import tiny

pytestmark = pytest.mark.versions


class Case(NamedTuple):
    """A layer; its input's shape; its equation `x,kernel->y`; the kernel's labels in the order of ΔW's axes."""

    layer: nn.Module
    x: tuple[int, ...]
    equation: str
    inputs: str
    outputs: str


CASES = {
    "Dense": Case(nn.Dense(10), (3, 7, 6), "bti,io->bto", "i", "o"),
    "two outputs": Case(nn.DenseGeneral((2, 5)), (3, 7, 6), "bti,iok->btok", "i", "ok"),
    "attention's output": Case(nn.DenseGeneral(10, axis=(-2, -1)), (4, 7, 2, 3), "bthk,hko->bto", "hk", "o"),
    "axes out of order": Case(nn.DenseGeneral(10, axis=(-1, 1)), (4, 2, 7, 3), "bitj,ijo->bto", "ij", "o"),
    "first axis": Case(nn.DenseGeneral(10, axis=0), (6, 3), "ib,io->bo", "i", "o"),
    "kernel permuted": Case(nn.Einsum((5, 2, 6), "nta,hba->nthb"), (3, 7, 6), "nta,hba->nthb", "a", "hb"),
    "outputs swapped": Case(nn.Einsum((6, 2, 5), "btd,dhk->bkth", False), (3, 7, 6), "btd,dhk->bkth", "d", "hk"),
    "ellipsis": Case(nn.Einsum((6, 2, 5), "...d, dhk -> ...hk"), (3, 7, 6), "btd,dhk->bthk", "d", "hk"),
}


@pytest.mark.parametrize("strategy", ["batched", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_layers_compute_with_the_updated_kernel_adapted_and_merged(name: str, strategy: Any) -> None:
    case = CASES[name]
    x = np.random.default_rng(4).normal(size=case.x).astype(np.float32)
    host = Host(case.layer)
    variables = host.init(jax.random.key(0), x)
    config = mj.MELoRAConfig(n=2, r=R, alpha=ALPHA, targets=["layer"], strategy=strategy)
    adapted, melora = linen.adapt(host, variables, config, jax.random.key(1), x)
    run, run_plain = jax.jit(adapted.apply), jax.jit(host.apply)
    np.testing.assert_array_equal(run({**variables, "melora": melora}, x), run_plain(variables, x))
    both = {**variables, "melora": stirred(melora)}
    kernel = np.asarray(variables["params"]["layer"]["kernel"])
    labels = case.equation.replace("->", ",").split(",")[1]
    sizes = dict(zip(labels, kernel.shape, strict=True))
    order = case.inputs + case.outputs
    delta = flat_delta(both["melora"]["layer"]).reshape([sizes[label] for label in order])
    update = np.einsum(f"{order}->{labels}", delta)
    expected = np.einsum(case.equation, x, kernel + update)
    assert abs(np.einsum(case.equation, x, update)).max() > 0.3
    np.testing.assert_allclose(run(both, x), expected, rtol=1e-4, atol=1e-5)
    merged = adapted.merge(both)
    np.testing.assert_allclose(merged["params"]["layer"]["kernel"], kernel + update, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run_plain(merged, x), expected, rtol=1e-4, atol=1e-5)


class Table(nn.Module):
    """An embedding, looked up and attended to."""

    def setup(self) -> None:
        self.embed = nn.Embed(14, 6)

    def __call__(self, ids: Any) -> Any:
        return self.embed.attend(jnp.tanh(self.embed(ids)))


def test_an_embedding_looks_up_and_attends_with_the_updated_table() -> None:
    ids = jnp.array([[0, 13, 5], [6, 7, 1]])
    variables = Table().init(jax.random.key(0), ids)
    config = mj.MELoRAConfig(n=2, r=R, alpha=ALPHA, targets=["embed"])
    adapted, melora = linen.adapt(Table(), variables, config, jax.random.key(1), ids)
    both = {**variables, "melora": stirred(melora)}
    table = np.asarray(variables["params"]["embed"]["embedding"]) + flat_delta(both["melora"]["embed"])
    expected = np.tanh(table[ids]) @ table.T
    np.testing.assert_allclose(jax.jit(adapted.apply)(both, ids), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(Table().apply)(adapted.merge(both), ids), expected, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """`tiny.Block` in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jnp.tanh(nn.Dense(tiny.INNER, name="query")(x)) * nn.Dense(tiny.INNER, name="value")(x)
        return x + nn.Dense(tiny.WIDTH, use_bias=False, name="out")(inner)


class Layers(nn.Module):
    layers: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in range(self.layers):
            x = Block(name=str(number))(x)
        return x


class Encoder(nn.Module):
    """`tiny.Encoder` in Linen, its parameters under the same paths."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = Layers(name="layer")(nn.Embed(tiny.VOCAB, tiny.WIDTH, name="embed")(ids))
        return nn.Dense(tiny.LABELS, name="classifier")(x.mean(-2))


def tree_of(arrays: dict[str, np.ndarray]) -> Any:
    return flax.traverse_util.unflatten_dict({tuple(path.split("/")): jnp.asarray(v) for path, v in arrays.items()})


def paired(**changes: Any) -> tuple[Any, linen.AdaptedModule, dict[str, Any]]:
    """`tiny`'s adapted NNX encoder, the Linen one with the same config, and its variables with the same arrays."""
    model, config = tiny.trained(**changes), tiny.config(**changes)
    variables = {"params": tree_of(tiny.arrays(tiny.Encoder()))}
    adapted, melora = linen.adapt(Encoder(), variables, config, jax.random.key(0), tiny.IDS)
    factors = tree_of(tiny.arrays(model, nnx.Param))
    assert jax.tree.map(jnp.shape, factors) == jax.tree.map(jnp.shape, melora)
    return model, adapted, {**variables, "melora": factors}


CONFIGS: dict[str, dict[str, Any]] = {
    "mixed ranks and alphas": {"r": [1, 3], "alpha": [4, 10], "targets": "all-linear"},
    "overrides": {"n_pattern": {"0.query": 1}, "rank_pattern": {"1.value": [2, 1]}, "alpha_pattern": {"value": 3}},
    "shuffle, total": {"mixer": "shuffle", "r": 4, "scaling": "total", "strategy": "batched"},
    "all, rslora": {"mixer": "all", "r": 3, "scaling": "rslora", "exclude": ["1.query"]},
    "an embedding": {"targets": ["embed", "out"], "n_pattern": {"embed": 1}, "layers": None},
    "one layer": {"layers": [1]},
    "a head alone": {"targets": ()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_nnx_model_with_the_same_arrays(name: str) -> None:
    model, adapted, variables = paired(**CONFIGS[name])
    y = jax.jit(adapted.apply)(variables, tiny.IDS)
    np.testing.assert_allclose(y, tiny.run(model, tiny.IDS), rtol=1e-5, atol=1e-6)
    ours, theirs = adapted.adaptation, mj.describe(model)
    # "merged" is for NNX models
    sites = {site.path: dataclasses.replace(site, strategy="packed") for site in theirs.sites}
    assert {site.path: dataclasses.replace(site, strategy="packed") for site in ours.sites} == sites
    assert (ours.adapter, ours.head, ours.frozen, ours.saved) == (
        theirs.adapter,
        theirs.head,
        theirs.frozen,
        theirs.saved,
    )
    merged = adapted.merge(variables)
    assert sorted(merged) == ["params"]
    expected = tiny.arrays(mj.merge(model))
    found = flax.traverse_util.flatten_dict(merged["params"], sep="/")
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_dropout_draws_the_masks_of_the_nnx_model() -> None:
    model, adapted, variables = paired(targets=["embed", "query", "out"], n_pattern={"embed": 1}, dropout=0.4)

    def drawn(key: jax.Array | None, call: Any) -> jax.Array:
        with mj.dropout_key(key):
            return call(tiny.IDS)

    ours = jax.jit(lambda key, variables: drawn(key, lambda ids: adapted.apply(variables, ids)))
    theirs = nnx.jit(lambda key, model: drawn(key, model))(jax.random.key(5), model)
    np.testing.assert_allclose(ours(jax.random.key(5), variables), theirs, rtol=1e-5, atol=1e-6)
    assert abs(theirs - ours(None, variables)).max() > 1e-3


def test_the_start_is_the_base_and_does_not_depend_on_the_other_sites() -> None:
    variables = Encoder().init(jax.random.key(0), tiny.IDS)
    few, many = (
        linen.adapt(Encoder(), variables, tiny.config(**changes), jax.random.key(5), tiny.IDS)
        for changes in ({"targets": ["1.value"]}, {"targets": "all-linear"})
    )
    np.testing.assert_array_equal(
        jax.jit(many[0].apply)({**variables, "melora": many[1]}, tiny.IDS),
        jax.jit(Encoder().apply)(variables, tiny.IDS),
    )
    a, other = few[1]["layer"]["1"]["value"]["a"], many[1]["layer"]["1"]["value"]["a"]
    np.testing.assert_array_equal(a, other)
    assert not np.array_equal(other, many[1]["layer"]["0"]["value"]["a"])
    assert 0.5 < abs(a).max() * np.sqrt(a.shape[1]) <= 1  # within 1/sqrt(i)


def test_optax_trains_the_collection_alone_and_params_stay_bitwise_as_they_were() -> None:
    variables = Encoder().init(jax.random.key(0), tiny.IDS)
    before = jax.tree.map(np.array, variables)
    adapted, melora = linen.adapt(Encoder(), variables, tiny.config(), jax.random.key(1), tiny.IDS)
    started, labels, tx = melora, jnp.array([1, 2]), optax.adam(1e-2)

    def loss(melora: Any) -> jax.Array:
        logits = adapted.apply({**variables, "melora": melora}, tiny.IDS)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(melora: Any, state: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(melora)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(melora, updates), state, value

    step, state, losses = jax.jit(step, donate_argnums=0), tx.init(melora), []
    melora = jax.tree.map(jnp.copy, melora)
    for _ in range(20):
        melora, state, value = step(melora, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    moved = jax.tree.map(lambda new, old: not np.array_equal(new, old), melora, started)
    assert all(jax.tree.leaves(moved))


def test_only_the_entries_that_a_mini_has_learn_and_they_are_as_many_as_told() -> None:
    _, adapted, variables = paired(
        r=[1, 3], targets="all-linear", modules_to_save=[], n_pattern={"classifier": 1}, rank_pattern={"classifier": 2}
    )

    def loss(melora: Any) -> jax.Array:
        return (adapted.apply({**variables, "melora": melora}, tiny.IDS) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(variables["melora"])
    learning = sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(gradient))
    assert learning == adapted.adaptation.trainable == 2 * 3 * 4 * (3 + 5) + 2 * (6 + 3)


def test_an_input_slice_moves_its_own_output_slice_alone() -> None:
    layer, x = Host(nn.Dense(10, use_bias=False)), jnp.ones((1, 6))
    variables = jax.tree.map(jnp.zeros_like, layer.init(jax.random.key(0), x))
    adapted, melora = linen.adapt(layer, variables, mj.MELoRAConfig(n=2, targets=["layer"]), jax.random.key(1), x)
    both = {**variables, "melora": stirred(melora)}
    y = np.asarray(adapted.apply(both, x))
    moved = np.asarray(adapted.apply(both, x.at[0, 3:].set(2.0))) != y
    assert moved.tolist() == [[False] * 5 + [True] * 5]


def test_a_bfloat16_kernel_is_summed_in_float32_and_rounded_once() -> None:
    layer, x = Host(nn.Dense(10, param_dtype=jnp.bfloat16)), jnp.ones((1, 6))
    variables = layer.init(jax.random.key(0), x)
    config = mj.MELoRAConfig(n=2, r=R, alpha=ALPHA, targets=["layer"])
    adapted, melora = linen.adapt(layer, variables, config, jax.random.key(1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(melora)} == {jnp.dtype(jnp.float32)}
    both = {**variables, "melora": stirred(melora)}
    merged = adapted.merge(both)["params"]["layer"]["kernel"]
    kernel = np.asarray(variables["params"]["layer"]["kernel"].astype(jnp.float32))
    exact = kernel + flat_delta(both["melora"]["layer"])
    assert merged.dtype == jnp.bfloat16
    assert (abs(np.asarray(merged, np.float32) - exact) <= abs(exact) * 2.0**-8 * 1.001).all()


def test_a_saved_head_is_a_float32_copy_that_a_donating_step_may_take() -> None:
    model = Host(nn.Dense(4, param_dtype=jnp.bfloat16))
    variables = model.init(jax.random.key(0), jnp.ones((1, 6)))
    for dtype in (jnp.bfloat16, jnp.float32):
        variables = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), variables)
        config = mj.MELoRAConfig(modules_to_save=["layer"])
        _, melora = linen.adapt(model, variables, config, jax.random.key(1), jnp.ones((1, 6)))
        assert {leaf.dtype for leaf in jax.tree.leaves(melora)} == {jnp.dtype(jnp.float32)}
        np.testing.assert_array_equal(melora["layer"]["kernel"], variables["params"]["layer"]["kernel"])
        jax.tree.map(lambda leaf: leaf.delete(), melora)
        assert np.isfinite(np.asarray(variables["params"]["layer"]["kernel"], np.float32)).all()


def test_the_collection_goes_to_a_folder_that_the_nnx_model_loads(tmp_path: Any) -> None:
    model, adapted, variables = paired(
        r=[1, 2], targets=["embed", "query"], n_pattern={"embed": 1}, rank_pattern={"embed": 2}
    )
    tree = adapted.adapter_tree(variables["melora"], base_model="tiny")
    write_adapter(tree, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base_model == "tiny"
    loaded = tiny.Encoder()
    mj.load_adapter(loaded, tmp_path / "adapter")
    tiny.assert_equal(tiny.arrays(loaded, nnx.Param), tiny.arrays(model, nnx.Param))


def adapting(**changes: Any) -> Callable[[], Any]:
    def run() -> Any:
        variables = jax.eval_shape(Encoder().init, jax.random.key(0), tiny.IDS)
        return linen.adapt(Encoder(), variables, tiny.config(**changes), jax.random.key(0), tiny.IDS)

    return run


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 7}, "n=7 does not divide d_in=6 at layer/0/query; choose n from 1, 2"),
    ({"n_pattern": {"1.value": 3}}, "n=3 does not divide d_out=10 at layer/1/value; choose n from 1, 2"),
    ({"targets": ["qery"]}, "targets: 'qery' matches no module; perhaps 'query'"),
    ({"targets": r"layer/\d/qery"}, "targets='layer/\\\\d/qery' matches no module; perhaps 'query'"),
    ({"targets": ["classifier"]}, "targets: 'classifier' lies in modules_to_save, which is trained whole; take it out"),
    ({"targets": ["layer"]}, "layer can't be adapted: Layers has no dense kernel [d_in, d_out]; adaptable are Dense, "),
    ({"exclude": ["quary"]}, "exclude: 'quary' matches no module; perhaps 'query'"),
    ({"layers": [1, 2]}, "layers=[2] hold no target; the targets lie in layers [0, 1]"),
    ({"rank_pattern": {"out": 2}}, "rank_pattern: 'out' matches no adapted layer; the first is layer/0/query"),
    ({"modules_to_save": ["pooler"]}, "modules_to_save: 'pooler' matches no module; the names there are: classifier,"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_does_not_fit_is_refused_as_for_nnx(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}[^\n]*$"):
        adapting(**changes)()
