"""Every supported layer, adapted, against numpy.einsum over W + ΔW with ΔW laid out by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.config import AdapterSpec
from melora_jax.core.dense_view import view_of_einsum
from melora_jax.nn.layer_view import view_of
from tests.support import reference

SPEC = AdapterSpec(n=2, r=(1, 2), alpha=(3.0, 5.0))


class Case(NamedTuple):
    """A layer; its input's shape; its equation `x,kernel->y`; the kernel's labels in the order of ΔW's axes."""

    make: Callable[[nnx.Rngs], nnx.Module]
    x: tuple[int, ...]
    equation: str
    inputs: str
    outputs: str


def linear_general(*args: Any, **kwargs: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: nnx.LinearGeneral(*args, **kwargs, rngs=rngs)


def einsum(equation: str, kernel: tuple[int, ...], bias: tuple[int, ...] | None = None) -> Any:
    return lambda rngs: nnx.Einsum(equation, kernel, bias, rngs=rngs)


CASES = {
    "Linear": Case(lambda rngs: nnx.Linear(6, 10, rngs=rngs), (3, 6), "bi,io->bo", "i", "o"),
    "two outputs": Case(linear_general(6, (2, 5)), (3, 7, 6), "bti,iok->btok", "i", "ok"),
    "two inputs, apart": Case(linear_general((2, 3), 10, axis=(1, -1)), (4, 2, 7, 3), "bitj,ijo->bto", "ij", "o"),
    "axes out of order": Case(linear_general((2, 2), 10, axis=(-1, 1)), (4, 2, 7, 2), "bitj,ijo->bto", "ij", "o"),
    "a mix of signs": Case(linear_general((3, 2), 10, axis=(-1, 2)), (4, 5, 3, 2), "btij,ijo->bto", "ij", "o"),
    "first axis": Case(linear_general(6, 10, axis=0), (6, 3), "ib,io->bo", "i", "o"),
    "attention's output": Case(linear_general((2, 3), 10, axis=(-2, -1)), (4, 7, 2, 3), "bthk,hko->bto", "hk", "o"),
    "kernel permuted": Case(einsum("nta,hba->nthb", (5, 2, 6), (5, 2)), (3, 7, 6), "nta,hba->nthb", "a", "hb"),
    "ellipsis": Case(einsum("...d, dhk -> ...hk", (6, 2, 5), (2, 5)), (3, 7, 6), "btd,dhk->bthk", "d", "hk"),
    "outputs swapped": Case(einsum("btd,dhk->bkth", (6, 2, 5)), (3, 7, 6), "btd,dhk->bkth", "d", "hk"),
    "inputs swapped": Case(einsum("bhtk,khd->btd", (2, 3, 10)), (4, 3, 7, 2), "bhtk,khd->btd", "kh", "d"),
    "ellipsis last": Case(einsum("bd...,do->bo...", (6, 10)), (3, 6, 7), "bdt,do->bot", "d", "o"),
    "batch swapped": Case(einsum("btd,do->tbo", (6, 10)), (3, 3, 6), "btd,do->tbo", "d", "o"),
    "batch summed": Case(einsum("b...td,do->b...o", (6, 10)), (3, 5, 7, 6), "bstd,do->bso", "d", "o"),
}


def wrapped(make: Callable[[nnx.Rngs], nnx.Module], spec: AdapterSpec = SPEC) -> mj.MELoRADense:
    """An adapted layer with a random bias and a random B."""
    base: Any = make(nnx.Rngs(0))
    rng = np.random.default_rng(1)
    if getattr(base, "bias", None) is not None:
        base.bias[...] = jnp.asarray(rng.normal(size=base.bias.shape), jnp.float32)
    layer = mj.MELoRADense.wrap(base, spec, path="site", rngs=nnx.Rngs(2))
    layer.b[...] = jnp.asarray(rng.normal(size=layer.b.shape), jnp.float32)
    return layer


def flat_delta(layer: mj.MELoRADense) -> np.ndarray:
    a, b, r = np.asarray(layer.a[...]), np.asarray(layer.b[...]), layer.spec.r
    factors = [a[k, :, :rank] for k, rank in enumerate(r)], [b[k, :rank] for k, rank in enumerate(r)]
    return reference.delta(*factors, reference.scales(r, layer.spec.alpha, "mini"))


@pytest.mark.parametrize("name", CASES)
def test_adapted_and_merged_layers_compute_with_the_updated_kernel(name: str) -> None:
    case = CASES[name]
    layer = wrapped(case.make)
    x = np.random.default_rng(4).normal(size=case.x).astype(np.float32)
    kernel = np.asarray(layer.base.kernel[...])
    labels = case.equation.replace("->", ",").split(",")[1]
    sizes = dict(zip(labels, kernel.shape, strict=True))
    order = case.inputs + case.outputs
    update = np.einsum(f"{order}->{labels}", flat_delta(layer).reshape([sizes[label] for label in order]))
    expected = np.einsum(case.equation, x, kernel + update) + bias_of(layer, case.equation)
    assert abs(np.einsum(case.equation, x, update)).max() > 1
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x), expected, rtol=1e-4, atol=1e-4)
    plain = mj.merge(layer)
    assert type(plain) is type(layer.base)
    np.testing.assert_allclose(plain.kernel[...], kernel + update, rtol=1e-5, atol=1e-5)


def bias_of(layer: mj.MELoRADense, equation: str) -> Any:
    """The bias with the output's axes in their places."""
    if layer.base.bias is None:
        return 0.0
    bias = np.asarray(layer.base.bias[...])
    _, kernel, out = equation.replace("->", ",").split(",")
    features = [label for label in out if label in kernel]
    assert out.endswith("".join(features))
    return bias


def test_embeddings_look_up_attend_and_merge_with_the_updated_table() -> None:
    layer = wrapped(lambda rngs: nnx.Embed(14, 6, rngs=rngs))
    table = np.asarray(layer.base.embedding[...]) + flat_delta(layer)
    ids = np.array([[0, 13, 5], [-1, 6, -14]])
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, ids), table[ids], rtol=1e-5, atol=1e-5)
    query = np.random.default_rng(5).normal(size=(3, 6)).astype(np.float32)
    attend = nnx.jit(lambda layer, x: layer.attend(x))
    np.testing.assert_allclose(attend(layer, query), query @ table.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mj.merge(layer).embedding[...], table, rtol=1e-5, atol=1e-5)


def test_only_embeddings_attend() -> None:
    with pytest.raises(AttributeError, match="'Linear' at site has no attend"):
        wrapped(CASES["Linear"].make).attend(jnp.ones(6))


def test_an_equation_given_at_the_call_is_followed() -> None:
    layer = wrapped(einsum("btd,do->bto", (6, 10)))
    x = np.random.default_rng(6).normal(size=(3, 4, 6)).astype(np.float32)
    kernel = np.asarray(layer.base.kernel[...]) + flat_delta(layer)
    both = nnx.jit(lambda layer, x: (layer(x, "btd,do->otb"), layer(x, einsum_str="btd,do->otb")))
    for y in both(layer, x):
        np.testing.assert_allclose(y, np.einsum("btd,do->otb", x, kernel), rtol=1e-4, atol=1e-4)


def test_an_equation_that_turns_the_kernel_round_is_refused_at_the_call() -> None:
    layer = wrapped(einsum("btd,do->bto", (6, 6)))
    with pytest.raises(
        ValueError, match=r"^Einsum at site is called with 'bto,do->btd', .* its own 'btd,do->bto'; leave"
    ):
        layer(jnp.ones((3, 4, 6)), "bto,do->btd")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            linear_general(6, 10, batch_axis={0: 4}),
            "LinearGeneral with batch_axis={0: 4} holds one kernel a batch entry, not one [d_in, d_out]",
        ),
        (einsum("bhd,hdk->bhk", (2, 6, 10)), "kernel label(s) ['h'] are neither summed nor new"),
        (einsum("bd,dok->bo", (6, 10, 2)), "kernel label(s) ['k'] are neither summed nor new"),
        (einsum("bdd,do->bo", (6, 10)), "it sums nothing, or repeats a label"),
        (einsum("bdo,do->b", (6, 10)), "it sums nothing, or repeats a label"),
        (einsum("b,do->bdo", (6, 10)), "it sums nothing, or repeats a label"),
        (einsum("bd...,d...->bd", (6, 10)), "kernel label(s) ['d'] are neither summed nor new"),
        (einsum("b...,...o->bo", (6, 10)), "it sums nothing, or repeats a label"),
        (lambda rngs: nnx.Conv(6, 10, (3,), rngs=rngs), "Conv has no dense kernel [d_in, d_out]; adaptable are Linear"),
        (lambda rngs: nnx.LayerNorm(6, rngs=rngs), "LayerNorm has no dense kernel [d_in, d_out]; adaptable are Linear"),
    ],
)
def test_layers_without_a_flat_kernel_are_refused_with_the_reason(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        view_of(make(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^there/0 can't be adapted: .*; leave it out with exclude=\['there/0'\]$"):
        mj.MELoRADense.wrap(make(nnx.Rngs(0)), SPEC, path="there/0", rngs=nnx.Rngs(0))


def test_a_view_says_how_the_layer_lies_flat() -> None:
    view = view_of_einsum("...td,hdk->...htk", (2, 6, 5))
    assert (view.d_in, view.d_out, view.order) == (6, 10, (1, 0, 2))
    assert (view.in_axes, view.out_axes, view.out_shape, view.batch) == ((-1,), (-3, -1), (2, 5), None)
    embed = view_of(nnx.Embed(14, 6, rngs=nnx.Rngs(0)))
    assert (embed.d_in, embed.d_out, embed.kernel_name, embed.lookup) == (14, 6, "embedding", True)
