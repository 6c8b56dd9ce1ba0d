"""disable_adapters: the base's outputs bit for bit inside, the adapted ones outside, for every kind and in stacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.models.auto import model_from_config
from tests.support import tiny
from tests.support.tiny_run import DECODER_SIZES

KINDS: dict[str, dict[str, Any]] = {
    "MELoRA": {},
    "embedding": {"n": 1, "targets": ["embed", "query"]},
    "merged": {"strategy": "merged"},
    "DoRA": {"variant": "dora"},
    "AdaLoRA": {"variant": "adalora"},
    "PiSSA": {"init": "pissa"},
}


@pytest.mark.parametrize("name", KINDS)
def test_inside_are_the_base_s_outputs_and_outside_the_adapter_s(name: str) -> None:
    model = tiny.adapted(**KINDS[name])
    y, base, before = tiny.run(model, tiny.IDS), tiny.run(mj.unwrap(model), tiny.IDS), tiny.snapshot(model)
    assert abs(np.asarray(y - base)).max() > 1e-3
    with mj.disable_adapters(model):
        assert (tiny.run(model, tiny.IDS) == base).all()
        with mj.disable_adapters(model):
            assert (tiny.run(model, tiny.IDS) == base).all()
        assert (tiny.run(model, tiny.IDS) == base).all()
        assert (model(tiny.IDS) == mj.unwrap(model)(tiny.IDS)).all()
    assert (tiny.run(model, tiny.IDS) == y).all()
    tiny.assert_as_before(model, before)


@pytest.mark.parametrize("name", ["MELoRA", "DoRA", "AdaLoRA", "PiSSA"])
def test_inside_of_a_trace_and_in_a_stack(name: str) -> None:
    model = model_from_config(DECODER_SIZES, task="causal-lm", rngs=nnx.Rngs(3))
    mj.adapt(model, mj.MELoRAConfig(n=2, **KINDS[name], targets=["q_proj", "up_proj"]), rngs=nnx.Rngs(1))
    tiny.stirred(model)
    mj.stack_layers(model)
    plain = mj.unwrap(model)
    mj.stack_layers(plain)
    before = tiny.snapshot(model)

    @jax.jit
    def both(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        with mj.disable_adapters(model):
            base = model(ids)
        return base, model(ids)

    base, y = both(tiny.IDS)
    assert (base == tiny.run(plain, tiny.IDS)).all()
    np.testing.assert_allclose(y, tiny.run(model, tiny.IDS), rtol=0, atol=1e-6)
    assert abs(np.asarray(y - base)).max() > 1e-3
    tiny.assert_as_before(model, before)


def test_a_loss_may_take_the_base_as_its_reference() -> None:
    model = tiny.adapted()
    base = tiny.run(mj.unwrap(model), tiny.IDS)

    def loss(model: Any, ids: jax.Array) -> jax.Array:
        with mj.disable_adapters(model):
            reference = jax.lax.stop_gradient(model(ids))
        return ((model(ids) - reference) ** 2).sum()

    value, grads = nnx.jit(nnx.value_and_grad(loss))(model, tiny.IDS)
    np.testing.assert_allclose(value, ((tiny.run(model, tiny.IDS) - base) ** 2).sum(), rtol=1e-5)
    assert all(abs(np.asarray(grad)).max() > 0 for grad in jax.tree.leaves(grads))


def test_an_embedding_s_logits_are_the_base_s() -> None:
    layer = mj.MELoRADense.wrap(
        nnx.Embed(6, 4, rngs=nnx.Rngs(0)),
        mj.MELoRAConfig(n=2, r=1, targets=["embed"]).spec("embed"),
        path="embed",
        rngs=nnx.Rngs(1),
    )
    tiny.stirred(layer)
    query = jnp.ones((3, 4))
    with mj.disable_adapters(layer):
        assert (layer.attend(query) == layer.base.attend(query)).all()
    assert abs(np.asarray(layer.attend(query) - layer.base.attend(query))).max() > 1e-3


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = tiny.adapted()
    before = tiny.snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), mj.disable_adapters(model):
        raise RuntimeError("inside")
    tiny.assert_as_before(model, before)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Encoder was not adapted; "), mj.disable_adapters(tiny.Encoder()):
        pass
    head = tiny.Encoder()
    mj.adapt(head, mj.MELoRAConfig(targets=(), modules_to_save=["classifier"]), rngs=nnx.Rngs(0))
    with mj.disable_adapters(head):
        assert head(tiny.IDS).shape == (2, tiny.LABELS)
