"""Mixer `scatter`: MELoRA on features dealt to the minis in a fixed random order, against the equation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.checkpoints.adapter_state import SiteFactors
from melora_jax.checkpoints.factors import factors_from_plain, plain_factors
from melora_jax.config import AdapterSpec
from melora_jax.core import blocks
from melora_jax.core.products import latents
from tests.support import reference, tiny

pytestmark = pytest.mark.slow

D_IN, D_OUT, N, R = 21, 33, 3, 2
SPEC = AdapterSpec(n=N, r=(R,) * N, alpha=(3.0, 5.0, 7.0), mixer="scatter")


def drawn(seed: int = 0) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    return np.random.default_rng(seed).normal(size=(5, D_IN)).astype(np.float32), *reference.generic_factors(
        seed, D_IN, D_OUT, SPEC.r
    )


def expected(x: np.ndarray, a: Any, b: Any) -> np.ndarray:
    """The j-th feature that the minis see is number order[j], and so with what they write."""
    y = np.empty((len(x), D_OUT))
    y[:, blocks.feature_order(D_OUT, 1)] = reference.melora(x[:, blocks.feature_order(D_IN, 0)], a, b, SPEC.scales)
    return y


def test_orders_are_permutations_that_scatter_every_slice() -> None:
    orders = blocks.feature_order(D_IN, 0), blocks.feature_order(D_OUT, 1)
    for order in orders:
        assert sorted(order) == list(range(len(order)))
        for part in np.split(order, N):
            assert len({feature // (len(order) // N) for feature in part}) > 1
    assert list(blocks.feature_order(D_IN, 0)) != list(blocks.feature_order(D_IN, 1))


@pytest.mark.parametrize("strategy", ["batched", "packed"])
def test_the_product_is_the_equation_on_dealt_features(strategy: Any) -> None:
    x, a, b = drawn()
    stacked = tuple(map(jnp.asarray, (np.stack(a), np.stack(b))))
    scale = blocks.scale_of(SPEC)
    y = jax.jit(lambda x, a, b: latents.apply(x, a, b, scale, "scatter", strategy))(x, *stacked)
    np.testing.assert_allclose(y, expected(x, a, b), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x @ blocks.delta(*stacked, scale, "scatter"), y, rtol=1e-5, atol=1e-5)
    one_hot = jnp.eye(D_IN, dtype=jnp.float32)
    found = latents.look_up(jnp.arange(D_IN), stacked[0], jnp.ones(D_IN), "scatter")
    np.testing.assert_allclose(found, latents.reduce(one_hot, stacked[0], strategy, "scatter"), rtol=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_plain_factors_go_back_to_the_minis(scaled: bool) -> None:
    _, a, b = drawn()
    site = SiteFactors(SPEC, a=np.stack(a), b=np.stack(b))
    left, right = plain_factors(site, scaled=scaled)
    back = factors_from_plain(SPEC, left, right, scaled=scaled)
    np.testing.assert_array_equal(back[0], site.a)
    np.testing.assert_allclose(back[1], site.b, rtol=1e-6)


def test_a_model_with_it_merges_saves_and_exports(tmp_path: Path) -> None:
    model = tiny.adapted(mixer="scatter", targets=["query", "embed"], n_pattern={"embed": 1})
    y = tiny.run(model, tiny.IDS)
    np.testing.assert_allclose(tiny.run(mj.merge(model), tiny.IDS), y, rtol=1e-5, atol=1e-5)
    loaded, imported = tiny.Encoder(), tiny.Encoder()
    mj.load_adapter(loaded, mj.save_adapter(model, tmp_path / "own"))
    mj.import_peft(imported, mj.export_peft(model, tmp_path / "peft"))
    np.testing.assert_array_equal(tiny.run(loaded, tiny.IDS), y)
    np.testing.assert_allclose(tiny.run(imported, tiny.IDS), y, rtol=1e-5, atol=1e-5)
    plain = tiny.adapted(mixer="scatter", targets=["query"])
    with pytest.raises(ValueError, match='mixer="scatter", whose A is not block-diagonal; choose format="lora"'):
        mj.export_peft(plain, tmp_path / "bd", format="bdlora")


def test_it_is_not_melora_and_counts_as_much() -> None:
    layers = [mj.MELoRADense(D_IN, D_OUT, n=N, r=R, mixer=mixer, rngs=nnx.Rngs(0)) for mixer in ("identity", "scatter")]
    for layer in layers:
        layer.b.set_value(jnp.ones(layer.b.shape))
    x = jnp.asarray(drawn()[0])
    assert layers[0].a.shape == layers[1].a.shape
    assert not np.allclose(layers[0](x), layers[1](x))
