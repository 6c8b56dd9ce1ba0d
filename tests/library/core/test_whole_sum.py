"""The sum of output and update: its derivatives, and that XLA does not keep both terms for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import melora_jax as mj
from melora_jax.core.products.xla_cpu import whole_sum

kept_sum = functools.partial(whole_sum, jnp.add)
BATCH, LENGTH, WIDTH, INNER, RANK, DEPTH = 2, 251, 61, 127, 3, 3


def drawn(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_it_is_a_sum_with_derivatives_of_every_kind() -> None:
    y, update = drawn(3, 5, 7), drawn(5, 3, 7).swapaxes(0, 1)
    np.testing.assert_array_equal(kept_sum(y, update), y + update)
    np.testing.assert_array_equal(jax.vmap(kept_sum, (0, 1))(y, update.swapaxes(0, 1)), y + update)

    def cubes(sum_of: Callable[..., Any]) -> Callable[..., Any]:
        return lambda y, update: (sum_of(y, 2 * update) ** 3).sum()

    given = (jnp.asarray(y), jnp.asarray(update))
    ours, plain = (jax.jvp(jax.grad(cubes(one), (0, 1)), given, given) for one in (kept_sum, jnp.add))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, plain)


def planned(sum_of: Callable[..., Any]) -> int:
    """The temporary bytes of the gradient of gated layers, of which each product has one of low rank beside it."""

    def loss(factors: Any, x: Any, kernels: Any) -> Any:
        for layer in range(DEPTH):
            gate, up, down = (
                functools.partial(
                    lambda kernel, a, b, x: sum_of(x @ kernel, (x @ a) @ b), kernels[place], *factors[place]
                )
                for place in range(3 * layer, 3 * layer + 3)
            )
            x = x + down(jax.nn.silu(gate(x)) * up(x))
        return (x**2).sum()

    sizes = [(WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)] * DEPTH
    factors = [(drawn(into, RANK), drawn(RANK, out)) for into, out in sizes]
    given = drawn(BATCH, LENGTH, WIDTH), [drawn(*size) for size in sizes]
    step: Any = jax.jit(jax.grad(loss)).lower(factors, *given)
    return step.compile().memory_analysis().temp_size_in_bytes


def test_the_backward_pass_keeps_the_sum_alone() -> None:
    """It would keep two terms each of gate and up."""
    assert planned(jnp.add) - planned(kept_sum) > 1.5 * DEPTH * BATCH * LENGTH * INNER * 4


def test_layers_take_it_where_it_pays() -> None:
    def program(use_bias: bool, n: int, r: int) -> str:
        layer = mj.MELoRADense(6, 10, n=n, r=r, strategy="packed", use_bias=use_bias, rngs=nnx.Rngs(0))
        return jax.jit(nnx.merge(*nnx.split(layer))).lower(drawn(7, 6)).as_text()

    taken = {
        (use_bias, n, r): "inlineable" in program(use_bias, n, r)
        for use_bias in (False, True)
        for n, r in ((1, 1), (1, 2), (2, 1))
    }
    assert taken == {
        (False, 1, 1): False,
        (False, 1, 2): True,
        (False, 2, 1): True,
        (True, 1, 1): False,
        (True, 1, 2): False,
        (True, 2, 1): True,
    }


def test_equal_layers_share_one_program() -> None:
    """Of one that they call each for itself, XLA would be given as many as there are layers."""
    layers = [mj.MELoRADense(6, 6, n=2, r=1, use_bias=False, rngs=nnx.Rngs(seed)) for seed in range(3)]
    program = jax.jit(lambda x: functools.reduce(lambda x, layer: layer(x), layers, x)).lower(drawn(7, 6)).as_text()
    assert program.count("call @_called") == 3
    assert program.count("func.func private @_called") == 1
