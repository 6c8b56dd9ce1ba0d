"""The strategy `merged` against NumPy and against `batched`: values, every gradient, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import melora_jax as mj
from melora_jax import functional
from melora_jax.config import AdapterSpec
from melora_jax.core import blocks
from melora_jax.core.dense_view import DenseView
from melora_jax.core.platform import compile_for
from melora_jax.core.products import latents
from melora_jax.core.products import merged as merged_module
from melora_jax.core.products.plan import MERGED_TOKENS, ProductPlan, blocks_cost_less, plan_product
from melora_jax.core.products.product import adapted_product
from melora_jax.core.products.xla_cpu import products_of_blocks
from melora_jax.linen import adapt as adapt_linen

D_IN, D_OUT = 30, 42
SPECS = {
    "few blocks, by way of the latents": AdapterSpec(n=2, r=(1, 1), alpha=(3.0, 5.0)),
    "one": AdapterSpec(n=1, r=(2,), alpha=(3.0,)),
    "mixed ranks, by blocks": AdapterSpec(n=3, r=(5, 2, 3), alpha=(3.0, 5.0, 7.0)),
    "all": AdapterSpec(n=3, r=(2, 2, 2), alpha=(3.0, 5.0, 7.0), mixer="all"),
    "shuffle": AdapterSpec(n=2, r=(4, 4), alpha=(3.0, 5.0), mixer="shuffle"),
}


def drawn(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def arrays(spec: AdapterSpec) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    n, r, used = spec.n, max(spec.r), blocks.scale_of(spec) != 0
    shapes = {"x": (2, 7, D_IN), "kernel": (D_IN, D_OUT), "a": (n, D_IN // n, r), "b": (n, r, D_OUT // n)}
    x, kernel, a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes.values())
    return x, kernel, a * used[:, None, :], b * used[:, :, None], rng.normal(size=(2, 7, D_OUT)).astype(np.float32)


def merged_plan(spec: AdapterSpec, d_in: int, d_out: int) -> ProductPlan:
    return plan_product(dataclasses.replace(spec, strategy="merged"), DenseView(d_in, d_out), mergeable=True)


def merged_product(x: Any, kernel: Any, a: Any, b: Any, spec: AdapterSpec) -> Any:
    """The product with the plan that a layer of these settings makes."""
    return adapted_product(merged_plan(spec, *kernel.shape), jnp.asarray(x), jnp.asarray(kernel), a, b)


def test_both_ways_to_the_gradients_are_tested() -> None:
    found = [merged_plan(spec, D_IN, D_OUT).gradients for spec in SPECS.values()]
    assert found == ["latents", "latents", "blocks", "latents", "latents"]


def test_narrow_blocks_are_cheaper_than_latents() -> None:
    """Where i·o is at most 3·n·r·(i + o)."""
    sizes = {(32, 1, 12, 48): True, (8, 1, 48, 48): True, (8, 1, 48, 49): False, (8, 2, 48, 192): True}
    assert {size: blocks_cost_less(*size) for size in sizes} == sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_value_and_gradients_are_the_products_with_the_sum(name: str) -> None:
    """In float64, with ΔW from the factors' dense product and its gradient xᵀg projected on them."""
    spec = SPECS[name]
    x, kernel, a, b, weight = arrays(spec)
    left, right = (
        np.asarray(part, np.float64) for part in blocks.packed_factors(a, b, blocks.scale_of(spec), spec.mixer)
    )
    y, back = jax.vjp(jax.jit(lambda *given: merged_product(*given, spec)), x, kernel, a, b)
    whole = kernel + left @ right
    np.testing.assert_allclose(y, x @ whole, rtol=2e-5, atol=2e-5)
    to_x, to_kernel, to_a, to_b = back(jnp.asarray(weight))
    product = x.reshape(-1, D_IN).T.astype(np.float64) @ weight.reshape(-1, D_OUT)
    np.testing.assert_allclose(to_x, weight @ whole.T, rtol=2e-5, atol=5e-5)
    np.testing.assert_allclose(to_kernel, product, rtol=2e-5, atol=2e-5)

    def projected(a: Any, b: Any) -> Any:
        left, right = blocks.packed_factors(a, b, blocks.scale_of(spec), spec.mixer)
        return (jnp.matmul(left, right, precision="highest") * product).sum()

    for found, expected in zip((to_a, to_b), jax.grad(projected, (0, 1))(a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_its_gradient_has_a_forward_mode_derivative(name: str) -> None:
    """As a product of the Hessian with a vector needs; against the product beside the base."""
    spec = SPECS[name]
    x, kernel, a, b, weight = arrays(spec)

    def loss(factors: Any, product: Any) -> Any:
        return (jnp.sin(product(*factors)) * weight).sum()

    def beside(a: Any, b: Any) -> Any:
        return x @ kernel + latents.apply(jnp.asarray(x), a, b, blocks.scale_of(spec), spec.mixer)

    at, along = (a, b), (b.sum() * a, a.sum() * b)
    found, expected = (
        jax.jvp(lambda factors, product=product: jax.grad(loss)(factors, product), (at,), (along,))[1]
        for product in (lambda a, b: merged_product(x, kernel, a, b, spec), beside)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("name", ["few blocks, by way of the latents", "mixed ranks, by blocks", "shuffle"])
def test_the_backward_pass_does_not_keep_the_sums_of_all_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, width, depth = SPECS[name], 210, 5

    def loss(factors: Any, x: Any, kernels: Any) -> Any:
        for (a, b), kernel in zip(factors, kernels, strict=True):
            x = jnp.sin(merged_product(x, kernel, a, b, spec))
        return x.sum()

    def planned() -> int:
        n, r, i = spec.n, max(spec.r), width // spec.n
        factors = [(np.ones((n, i, r), np.float32), np.ones((n, r, i), np.float32))] * depth
        given = np.ones((503, width), np.float32), [np.ones((width, width), np.float32)] * depth
        step: Any = jax.jit(jax.grad(lambda *given: loss(*given))).lower(factors, *given)
        return step.compile().memory_analysis().temp_size_in_bytes

    ours = planned()
    monkeypatch.setattr(merged_module, "_after", lambda plan, gradient, factor: factor)
    assert planned() - ours >= (depth - 2) * 4 * width * width


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_of_many_minis_are_those_of_numpy_in_the_form_of_every_platform(platform: str) -> None:
    """x·(W + ΔW) differentiated in NumPy's float64."""
    tokens, n, i, o = 61, 11, 3, 2
    x, kernel, a, b, weight = drawn(tokens, n * i), drawn(n * i, n * o), drawn(n, i, 1), drawn(n, 1, o), drawn(n * o, 1)
    spec = AdapterSpec(n=n, r=(1,) * n, alpha=tuple(range(1, n + 1)))

    def loss(x: Any, a: Any, b: Any) -> Any:
        return (merged_product(x, jnp.asarray(kernel), a, b, spec) @ weight).sum()

    with compile_for(platform):
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, a, b)
    wide = [array.astype(np.float64) for array in (x, kernel, a, b, weight)]
    scaled = wide[2] * np.arange(1, n + 1)[:, None, None]
    whole = wide[1].copy()
    for k in range(n):
        whole[k * i : (k + 1) * i, k * o : (k + 1) * o] += scaled[k] @ wide[3][k]
    of_blocks = np.einsum("tni,no->nio", wide[0].reshape(tokens, n, i), wide[4].reshape(n, o))
    to_a = of_blocks @ wide[3].swapaxes(1, 2) * np.arange(1, n + 1)[:, None, None]
    expected = np.broadcast_to(wide[4].T @ whole.T, x.shape), to_a, scaled.swapaxes(1, 2) @ of_blocks
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("n", "rows", "i", "o"), [(2, 14, 7, 5), (3, 14, 5, 7), (1, 14, 5, 7), (10, 1543, 7, 11), (9, 1543, 13, 11)]
)
def test_the_blocks_of_a_product_come_from_its_columns(n: int, rows: int, i: int, o: int) -> None:
    x, cotangent = drawn(rows, n * i), drawn(rows, n * o)
    sliced = [part.reshape(rows, n, -1).astype(np.float64) for part in (x, cotangent)]
    expected = np.einsum("tni,tno->nio", *sliced)
    np.testing.assert_allclose(
        products_of_blocks(jnp.asarray(x), jnp.asarray(cotangent), n), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["few blocks, by way of the latents", "mixed ranks, by blocks"])
def test_factors_in_bfloat16_have_gradients_in_it(name: str) -> None:
    """Each the float32 gradient of the same values, rounded once."""
    spec = SPECS[name]
    x, kernel, a, b, weight = (jnp.asarray(array, jnp.bfloat16) for array in arrays(spec))
    back = jax.vjp(lambda a, b: merged_product(x, kernel, a, b, spec), a, b)[1]
    wide = [array.astype(jnp.float32) for array in (x, kernel, a, b, weight)]
    expected = jax.vjp(lambda a, b: merged_product(wide[0], wide[1], a, b, spec), *wide[2:4])[1](wide[4])
    for ours, theirs in zip(back(weight), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16))


def layers(spec: AdapterSpec, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Two layers, equal but for their strategy."""
    made = {}
    _, _, a, b, _ = arrays(spec)
    for strategy in ("batched", "merged"):
        layer = mj.MELoRADense(
            D_IN,
            D_OUT,
            n=spec.n,
            r=spec.r,
            alpha=spec.alpha,
            mixer=spec.mixer,
            strategy=strategy,
            param_dtype=dtype,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        layer.a[...], layer.b[...] = jnp.asarray(a) / 4, jnp.asarray(b) / 4
        layer.base.bias[...] = jnp.linspace(-1, 1, D_OUT).astype(dtype)
        made[strategy] = layer
    return made


def through(layer: Any, transform: Any) -> Any:
    """The output's sum of squares and the gradients of the factors and the input, through a transform of the layer."""
    graphdef, trainable, frozen = nnx.split(layer, nnx.Param, ...)
    x = jnp.asarray(arrays(SPECS["one"])[0], layer.base.kernel[...].dtype)

    @jax.jit
    def value_and_gradients(trainable: Any, x: Any) -> Any:
        def loss(trainable: Any, x: Any) -> Any:
            def call(x: Any) -> Any:
                return nnx.merge(graphdef, trainable, frozen, copy=True)(x)

            return (transform(call)(x).astype(jnp.float32) ** 2).sum()

        return jax.value_and_grad(loss, (0, 1))(trainable, x)

    return value_and_gradients(trainable, x)


def scanned(call: Any) -> Any:
    return lambda x: jax.lax.scan(lambda carry, row: (carry, call(row)), 0, x)[1]


TRANSFORMS = {"plain": lambda call: call, "remat": jax.checkpoint, "scan": scanned, "vmap": jax.vmap}


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["mixed ranks, by blocks", "shuffle"])
def test_a_layer_is_the_batched_one(name: str, transform: str) -> None:
    found, expected = (through(layer, TRANSFORMS[transform]) for layer in reversed(layers(SPECS[name]).values()))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), found, expected)


def test_in_bfloat16_an_update_too_small_for_the_kernels_digits_still_acts() -> None:
    made = layers(SPECS["mixed ranks, by blocks"], jnp.bfloat16)
    for layer in made.values():
        layer.b[...] = layer.b[...] * 1e-4
    x = jnp.asarray(arrays(SPECS["one"])[0], jnp.bfloat16)
    merged = made["merged"]
    y = nnx.jit(lambda layer, x: layer(x))(merged, x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64) @ (np.asarray(merged.base.kernel[...], np.float64) + np.asarray(merged.delta()))
    np.testing.assert_allclose(y.astype(jnp.float32), wide + np.asarray(merged.base.bias[...]), rtol=2**-7, atol=2**-7)
    found, expected = (through(layer, TRANSFORMS["plain"])[1] for layer in (merged, made["batched"]))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert abs(one - other).max() < 0.03 * abs(other).max()
    kernel, delta = merged.base.kernel[...], merged.delta()
    assert ((kernel + delta.astype(jnp.bfloat16)) == kernel).mean() > 0.5  # a sum in bfloat16 would have lost it


def test_auto_takes_it_for_many_latents_and_says_so() -> None:
    def strategy(**settings: Any) -> str:
        return mj.MELoRADense(48, 48, **({"n": 8, "r": 8} | settings), rngs=nnx.Rngs(0)).strategy

    assert strategy() == strategy(r=1) == strategy(n=1) == "merged"
    assert strategy(n=1, r=1) == "packed"
    assert strategy(dropout=0.1) == "batched"
    assert strategy(dtype=jnp.bfloat16) == "batched"
    assert strategy(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16) == "batched"
    assert strategy(dtype=jnp.bfloat16, strategy="merged") == "merged"
    assert strategy(strategy="packed") == "packed"
    assert strategy(mixer="shuffle") == "batched"


def test_few_tokens_do_not_form_the_sum_under_auto() -> None:
    layer = mj.MELoRADense(48, 48, n=8, r=8, rngs=nnx.Rngs(0))
    forms = {
        tokens: "custom_vjp_call" in str(jax.make_jaxpr(lambda x: layer(x))(jnp.ones((tokens, 48))))
        for tokens in (1, MERGED_TOKENS - 1, MERGED_TOKENS)
    }
    assert list(forms.values()) == [False, False, True]
    assert [layer.strategy_for(tokens) for tokens in (1, MERGED_TOKENS)] == ["batched", "merged"]


@pytest.mark.parametrize(("n", "r", "other"), [(8, 1, "packed"), (8, 8, "batched")])
def test_the_fewer_the_latents_the_more_tokens_it_takes(n: int, r: int, other: str) -> None:
    """A layer of SmolLM2's width, with its 512 tokens a step and with four times as many."""
    layer = mj.MELoRADense(576, 576, n=n, r=r, rngs=nnx.Rngs(0))
    found = [layer.strategy_for(tokens) for tokens in (1, 512, 4 * 512)]
    assert found == [other, "packed" if r == 1 else "merged", "merged"]
    asked = mj.MELoRADense(576, 576, n=n, r=r, strategy="merged", rngs=nnx.Rngs(0))
    assert asked.strategy_for(1) == "merged"


def test_other_frameworks_refuse_it_where_they_are_configured() -> None:
    config = mj.MELoRAConfig(n=2, r=1, targets=["here"], strategy="merged")
    message = r"strategy=\"merged\" is for NNX models; with melora_jax.functional use strategy=\"batched\" or \"auto\""
    with pytest.raises(ValueError, match=message):
        functional.init({"here": jnp.ones((6, 4))}, config, jax.random.key(0))

    class Host(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(4, name="here")(x)

    host, x = Host(), jnp.ones((3, 6))
    with pytest.raises(ValueError, match=r"is for NNX models; with melora_jax\.linen use"):
        adapt_linen(host, host.init(jax.random.key(0), x), config, jax.random.key(1), x)


def test_a_quantised_base_is_summed_where_that_is_asked_for() -> None:
    pytest.importorskip("qwix")
    outputs = {}
    for strategy in ("batched", "merged"):
        model = nnx.Sequential(nnx.Linear(64, 48, rngs=nnx.Rngs(0)))
        mj.quantize(model, "int8")
        config = mj.MELoRAConfig(n=4, r=2, targets=["layers/0"], strategy=strategy)
        (site,) = mj.adapt(model, config, rngs=nnx.Rngs(1)).sites
        assert site.strategy == strategy
        model.layers[0].b[...] = jnp.ones_like(model.layers[0].b[...])
        outputs[strategy] = nnx.jit(lambda model, x: model(x))(model, jnp.linspace(-1, 1, 192).reshape(3, 64))
    np.testing.assert_allclose(outputs["merged"], outputs["batched"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: nnx.Embed(6, 4, rngs=nnx.Rngs(0)), "Embed is not a dense layer (nnx.Linear)"),
        (
            lambda: nnx.Linear(
                6, 4, dot_general=lambda *given, **options: jax.lax.dot_general(*given), rngs=nnx.Rngs(0)
            ),
            "the layer has a dot_general of its own",
        ),
    ],
)
def test_what_has_no_kernel_to_sum_is_refused(layer: Any, why: str) -> None:
    spec = mj.MELoRAConfig(n=2, r=1, targets=["here"], strategy="merged").spec("here")
    with pytest.raises(ValueError, match=re.escape(f'strategy="merged" at here: {why}; use strategy="batched"')):
        mj.MELoRADense.wrap(layer(), spec, path="here", rngs=nnx.Rngs(0))
