"""MELoRADense against NumPy and the authors' equation in torch; its variables, dtypes, errors and compiled size."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.adapters.params import freeze, thaw
from melora_jax.config import AdapterSpec
from tests.support import reference

D_IN, D_OUT = 21, 15
R, ALPHA = (1, 2, 3), (4.0, 8.0, 16.0)


@nnx.jit
def run(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x)


def mixed_layer(**changes: Any) -> mj.MELoRADense:
    """Three minis of ranks 1, 2 and 3, with random B and bias."""
    layer = mj.MELoRADense(D_IN, D_OUT, **({"n": 3, "r": R, "alpha": ALPHA} | changes), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    layer.b[...] = jnp.asarray(rng.normal(size=layer.b.shape), jnp.float32)
    if layer.base.bias is not None:
        layer.base.bias[...] = jnp.asarray(rng.normal(size=D_OUT), layer.base.bias.dtype)
    return layer


def factors(layer: mj.MELoRADense) -> tuple[list[np.ndarray], list[np.ndarray]]:
    a, b = np.asarray(layer.a[...]), np.asarray(layer.b[...])
    return [a[k, :, :rank] for k, rank in enumerate(R)], [b[k, :rank] for k, rank in enumerate(R)]


def drawn_input(*shape: int) -> Any:
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("strategy", ["batched", "packed", "merged"])
@pytest.mark.parametrize("scaling", ["mini", "total", "rslora"])
def test_the_layer_is_the_equation(strategy: str, scaling: str) -> None:
    layer = mixed_layer(strategy=strategy, scaling=scaling)
    x = drawn_input(2, 5, D_IN)
    adapter = reference.melora(x, *factors(layer), reference.scales(R, ALPHA, scaling))
    expected = x @ np.asarray(layer.base.kernel[...]) + np.asarray(layer.base.bias[...]) + adapter
    np.testing.assert_allclose(run(layer, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parity
def test_the_layer_is_the_authors_forward() -> None:
    """Their forward, a Python loop over minis that slices the last axis of a 3-D input (PAPER: section 1.1)."""
    import torch

    layer = mixed_layer()
    x = drawn_input(2, 5, D_IN)
    weight = torch.tensor(np.asarray(layer.base.kernel[...])).T
    result = torch.nn.functional.linear(torch.tensor(x), weight, torch.tensor(np.asarray(layer.base.bias[...])))
    i = D_IN // len(R)
    outputs = []
    for k, (a, b) in enumerate(zip(*factors(layer), strict=True)):
        lora_a, lora_b = torch.nn.Linear(i, R[k], bias=False), torch.nn.Linear(R[k], D_OUT // len(R), bias=False)
        lora_a.weight.data, lora_b.weight.data = torch.tensor(a.T.copy()), torch.tensor(b.T.copy())
        outputs.append(lora_b(lora_a(torch.tensor(x)[:, :, k * i : (k + 1) * i])) * (ALPHA[k] / R[k]))
    result += torch.cat(outputs, dim=-1)
    np.testing.assert_allclose(run(layer, x), result.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_fresh_layer_is_its_base_bit_for_bit() -> None:
    base = nnx.Linear(D_IN, D_OUT, rngs=nnx.Rngs(3))
    x = drawn_input(5, D_IN)
    before = np.asarray(run(base, x))
    layer = mj.MELoRADense.wrap(base, AdapterSpec(n=3, r=R, alpha=ALPHA), path="site", rngs=nnx.Rngs(4))
    assert layer.base is base
    np.testing.assert_array_equal(run(layer, x), before)


def test_a_new_layer_freezes_its_base_and_trains_its_factors() -> None:
    layer = mj.MELoRADense(6, 10, n=2, r=3, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    found = {path: (type(v), v.shape, v.dtype) for path, v in nnx.to_flat_state(nnx.state(layer))}
    assert found == {
        ("a",): (mj.MELoRAParam, (2, 3, 3), jnp.float32),
        ("b",): (mj.MELoRAParam, (2, 3, 5), jnp.float32),
        ("base", "kernel"): (mj.FrozenParam, (6, 10), jnp.bfloat16),
    }
    assert layer.base.bias is None
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 2


def test_two_layers_of_one_source_start_with_different_factors() -> None:
    rngs = nnx.Rngs(0)
    one, other = (mj.MELoRADense(6, 10, n=2, rngs=rngs) for _ in range(2))
    assert not np.array_equal(one.a[...], other.a[...])
    assert not np.array_equal(one.a[0], one.a[1])


def test_merging_sums_in_float32_and_rounds_once() -> None:
    layer = mixed_layer(param_dtype=jnp.bfloat16)
    kernel = np.asarray(layer.base.kernel[...]).astype(np.float32)
    update = reference.delta(*factors(layer), reference.scales(R, ALPHA, "mini")).astype(np.float32)
    expected = (kernel + update).astype(ml_dtypes.bfloat16)
    merged = np.asarray(mj.merge(layer).kernel[...])
    assert merged.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(merged.astype(np.float32), expected.astype(np.float32), rtol=2**-7)
    assert (merged == expected).mean() > 0.99
    np.testing.assert_allclose(layer.delta(), update, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_layer_computes_in_bfloat16_unless_told_otherwise() -> None:
    x = jnp.asarray(drawn_input(64, D_IN), jnp.bfloat16)
    layer = mixed_layer(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    exact = reference.melora(np.asarray(x, np.float32), *factors(layer), reference.scales(R, ALPHA, "mini"))
    layer.base.kernel[...] *= 0
    layer.base.bias[...] *= 0
    coarse = run(layer, x)
    layer.spec = AdapterSpec(n=3, r=R, alpha=ALPHA, dtype="float32")
    fine = run(layer, x)
    assert coarse.dtype == fine.dtype == jnp.bfloat16
    rounded = exact.astype(ml_dtypes.bfloat16)
    assert (np.asarray(fine) == rounded).mean() > 0.99 > (np.asarray(coarse) == rounded).mean()
    np.testing.assert_allclose(np.asarray(coarse, np.float64), exact, rtol=0, atol=3 * 2.0**-8 * abs(exact).max())


def test_hosts_can_read_the_base_through_the_layer() -> None:
    layer = mixed_layer()
    assert layer.kernel is layer.base.kernel
    assert layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)
    with pytest.raises(AttributeError, match="no attribute 'kernal'"):
        _ = layer.kernal


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((64, 60), {"n": 7}, "n=7 does not divide d_in=64 at MELoRADense; choose n from 1, 2, 4"),
        ((64, 60), {"n": 8, "path": "layer/0"}, "n=8 does not divide d_out=60 at layer/0; choose n from 1, 2, 4"),
        ((6, 6), {"n": 0}, "n=0 must be a whole number of at least 1"),
        ((6, 6), {"n": 2, "r": 0}, "r=0 must be a whole number of at least 1, or a list with one for each mini"),
        ((6, 6), {"n": 2, "r": (1, 2, 3)}, "r=[1, 2, 3] has 3 values for n=2 minis; give one value, or 2"),
        ((6, 6), {"n": 2, "alpha": -1.0}, "alpha=-1.0 must be a number above 0"),
        ((6, 6), {"n": 2, "dropout": 1.0}, "dropout=1.0 must be a number at least 0 and below 1"),
        ((6, 6), {"n": 2, "mixer": "shufle"}, "mixer='shufle' is unknown; choose 'shuffle'"),
        ((6, 6), {"n": 2, "dtype": "float8_e5m2"}, "dtype='float8_e5m2' is unknown; choose 'float32'"),
    ],
)
def test_sizes_and_settings_that_do_not_fit(sizes: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mj.MELoRADense(*sizes, **changes, rngs=nnx.Rngs(0))


class Special(nnx.Param):
    """A parameter type of a host's own."""


def test_freezing_keeps_the_value_the_metadata_and_the_type() -> None:
    variable = Special(jnp.arange(3.0), note="kept")
    frozen = freeze(variable)
    assert isinstance(frozen, mj.FrozenParam)
    assert not isinstance(frozen, nnx.Param)
    assert frozen.get_raw_value() is variable.get_raw_value()
    assert frozen.note == "kept"
    back = thaw(frozen)
    assert type(back) is Special
    assert back.get_metadata() == variable.get_metadata()
    assert back.get_raw_value() is variable.get_raw_value()


@pytest.mark.parametrize("strategy", ["batched", "packed", "merged"])
@pytest.mark.parametrize(("mixer", "r"), [("identity", 1), ("shuffle", 32)])
def test_the_compiled_size_does_not_grow_with_n(mixer: Any, r: int, strategy: Any) -> None:
    lowered, compiled = [], []
    for n in (16, 32) if strategy == "merged" else (2, 8, 32):  # with few minis merged takes another way
        layer = mj.MELoRADense(64, 96, n=n, r=r, mixer=mixer, strategy=strategy, rngs=nnx.Rngs(0))
        graphdef, trainable, rest = nnx.split(layer, nnx.Param, ...)

        def loss(trainable: Any, rest: Any, x: Any, graphdef: Any = graphdef) -> Any:
            return (nnx.merge(graphdef, trainable, rest)(x) ** 2).sum()

        traced = jax.jit(jax.value_and_grad(loss)).lower(trainable, rest, jnp.ones((4, 64)))
        lowered.append(len(traced.as_text().splitlines()))
        compiled.append(len(str(traced.compile().as_text()).splitlines()))
    assert max(lowered) == min(lowered) < 200
    assert max(compiled) <= 1.1 * min(compiled)
