"""Surgery on a decoder as other NNX libraries write one: fused einsums, bare parameters, rope, tied ends."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import melora_jax as mj
from tests.support import reference, tiny

pytestmark = pytest.mark.slow

VOCAB, WIDTH, HEADS, HEAD, INNER = 29, 12, 3, 4, 10
TOKENS = jnp.array([[3, 1, 28, 7, 7], [0, 5, 11, 2, 9]])


class RMSNorm(nnx.Module):
    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Any) -> Any:
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.scale[...]


class Embedder(nnx.Module):
    """A table of its own, read for both ends of the model."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.input_embedding = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, WIDTH)))

    def encode(self, tokens: Any) -> Any:
        return self.input_embedding[...][tokens] * WIDTH**0.5

    def decode(self, x: Any) -> Any:
        return x @ self.input_embedding[...].T


def rotated(x: Any) -> Any:
    """Rope over [b t h k]."""
    angles = jnp.arange(x.shape[1])[:, None, None] / 10_000 ** (jnp.arange(HEAD // 2) / (HEAD // 2))
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """q, k and v in one kernel with a leading axis of three."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.qkv_einsum: Any = nnx.Einsum("btd,shdk->sbthk", (3, HEADS, WIDTH, HEAD), rngs=rngs)
        self.attn_vec_einsum = nnx.Einsum("bthk,hkd->btd", (HEADS, HEAD, WIDTH), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        query, key, value = self.qkv_einsum(x)
        scores = jnp.einsum("bthk,bshk->bhts", rotated(query), rotated(key)) * HEAD**-0.5
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        return self.attn_vec_einsum(jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), value))


class FeedForward(nnx.Module):
    """Gate and up projection in one bare parameter; the layer `router` is read instead of called."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.gating = nnx.Param(jax.random.normal(rngs.params(), (2, WIDTH, INNER)) * WIDTH**-0.5)
        self.down_proj = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)
        self.router = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        gate, up = jnp.einsum("btd,sdf->sbtf", x, self.gating[...])
        return self.down_proj(jax.nn.gelu(gate) * up) + x @ self.router.kernel[...]


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn, self.mlp = Attention(rngs), FeedForward(rngs)
        self.pre_attention_norm, self.pre_ffw_norm = RMSNorm(WIDTH), RMSNorm(WIDTH)

    def __call__(self, x: Any) -> Any:
        x = x + self.attn(self.pre_attention_norm(x))
        return x + self.mlp(self.pre_ffw_norm(x))


class Transformer(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embedder, self.final_norm = Embedder(rngs), RMSNorm(WIDTH)
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embedder.encode(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.decode(self.final_norm(x))


TARGETS = ["qkv_einsum", "attn_vec_einsum", "down_proj"]
CONFIG = mj.MELoRAConfig(n=2, r=(1, 3), alpha=(4.0, 6.0), targets=TARGETS)


def test_it_is_adapted_probed_and_merged() -> None:
    adaptation = tiny.check_round_trip(Transformer(), CONFIG, TOKENS)
    sizes = {"attn_vec_einsum": (12, 12), "qkv_einsum": (12, 36), "down_proj": (10, 12)}
    assert {site.path: (site.d_in, site.d_out) for site in adaptation.sites} == {
        f"layers/{k}/{part}/{name}": sizes[name]
        for k in range(2)
        for part, name in (("attn", "attn_vec_einsum"), ("attn", "qkv_einsum"), ("mlp", "down_proj"))
    }
    assert adaptation.adapter == 2 * 4 * sum((d_in + d_out) // 2 for d_in, d_out in sizes.values())


def test_the_fused_kernel_is_updated_by_the_papers_delta() -> None:
    model = Transformer()
    kernel = np.asarray(model.layers[1].attn.qkv_einsum.kernel[...])
    mj.adapt(model, CONFIG, rngs=nnx.Rngs(1))
    layer = tiny.stirred(model).layers[1].attn.qkv_einsum
    a, b = np.asarray(layer.a[...]), np.asarray(layer.b[...])
    delta = reference.delta([a[0, :, :1], a[1]], [b[0, :1], b[1]], [4.0, 2.0])
    update = np.transpose(delta.reshape(WIDTH, 3, HEADS, HEAD), (1, 2, 0, 3))
    merged = mj.merge(model).layers[1].attn.qkv_einsum.kernel[...]
    np.testing.assert_allclose(merged, kernel + update, rtol=1e-5, atol=1e-6)


def test_training_moves_the_adapters_and_no_bit_of_the_base() -> None:
    model = Transformer()
    mj.adapt(model, CONFIG, rngs=nnx.Rngs(1), probe=TOKENS)
    base, factors = tiny.arrays(model, mj.FrozenParam), tiny.arrays(model, nnx.Param)
    optimizer = nnx.Optimizer(model, mj.make_optimizer(model, 1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            logits = model(TOKENS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    tiny.assert_equal(tiny.arrays(model, mj.FrozenParam), base)
    assert all(not np.array_equal(value, factors[path]) for path, value in tiny.arrays(model, nnx.Param).items())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("router", "the adapter at layers/0/mlp/router, layers/1/mlp/router does not change the model's output: the"),
        ("embedder", "embedder can't be adapted: Embedder has no dense kernel [d_in, d_out]; adaptable are Linear,"),
        ("gating", "targets: 'gating' matches no module; perhaps 'attn'"),
    ],
)
def test_what_can_not_be_adapted_is_named_and_the_model_is_as_it_was(target: str, message: str) -> None:
    model = Transformer()
    before = tiny.snapshot(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        mj.adapt(model, mj.MELoRAConfig(n=2, targets=[target]), rngs=nnx.Rngs(1), probe=TOKENS)
    tiny.assert_as_before(model, before)
