"""Chunked cross-entropy: optax's plain one in value, in each token's loss and in gradients; its memory measured."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from melora_jax.training import chunked_cross_entropy

B, T, D, V = 3, 11, 5, 17


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "hidden": jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        "head": jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, V, (B, T))),
        "weights": jnp.asarray(rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) < 0.7), jnp.float32),
    }


def capped(logits):
    return 3.0 * jnp.tanh(logits / 3.0)


def plain(hidden, head, weights, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(capped(hidden @ head), labels)
    return (losses * weights).sum(), losses


def chunked(hidden, head, weights, labels, chunk):
    return chunked_cross_entropy(hidden, lambda x: capped(x @ head), labels, weights, chunk)


# 1 and 4: a token of each row; 7: pieces that do not divide T; 33: all at once; 1000: more than there is.
@pytest.mark.parametrize("chunk", [1, 4, 7, 33, 1000])
def test_value_losses_and_gradients_equal_plain(arrays, chunk):
    arguments = [arrays[name] for name in ("hidden", "head", "weights", "labels")]
    ours = functools.partial(chunked, chunk=chunk)
    (total, losses), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True))(*arguments)
    (wanted, wanted_losses), wanted_gradients = jax.value_and_grad(plain, argnums=(0, 1, 2), has_aux=True)(*arguments)
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6, atol=1e-6)
    for got, theirs in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, theirs, rtol=1e-6, atol=1e-6 * float(abs(theirs).max()))
    np.testing.assert_allclose(ours(*arguments)[1], wanted_losses, rtol=1e-6, atol=1e-6)


def test_gradients_equal_finite_differences(arrays):
    def total(hidden, head):
        return chunked(hidden, head, arrays["weights"], arrays["labels"], 7)[0] ** 2

    check_grads(total, (arrays["hidden"], arrays["head"]), order=1, modes=["rev"], atol=3e-2, rtol=3e-2, eps=1e-2)


def test_nested_and_frozen_arrays_of_the_head_are_found(arrays):
    """The gradient reaches what logits_of closes over through other functions; a frozen part beside it gets none."""
    frozen = arrays["head"]

    def loss(adapter, cross_entropy):
        def head(x):
            return x @ frozen + (x @ adapter["a"]) @ adapter["b"]

        return cross_entropy(lambda x: capped(head(x)))

    adapter = {"a": jnp.ones((D, 2)), "b": jnp.ones((2, V)) * jnp.arange(V)}
    total = jax.jit(jax.grad(loss), static_argnums=1)
    ours = total(
        adapter, lambda f: chunked_cross_entropy(arrays["hidden"], f, arrays["labels"], arrays["weights"], 7)[0]
    )
    theirs = total(
        adapter,
        lambda f: (
            optax.softmax_cross_entropy_with_integer_labels(f(arrays["hidden"]), arrays["labels"]) * arrays["weights"]
        ).sum(),
    )
    for name in adapter:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6 * float(abs(theirs[name]).max()))


def test_it_works_inside_a_scan_over_micro_batches(arrays):
    """As under `accumulate`: labels, weights and head are all tracers of the scan."""

    def loss(head, cross_entropy):
        def one(total, part):
            return total + cross_entropy(*part, head), None

        return jax.lax.scan(one, 0.0, tuple(arrays[k][:, None] for k in ("hidden", "labels", "weights")))[0]

    def ours(hidden, labels, weights, head):
        return chunked(hidden, head, weights, labels, 4)[0]

    def theirs(hidden, labels, weights, head):
        return plain(hidden, head, weights, labels)[0]

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(arrays["head"], function) for function in (ours, theirs)]
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-6 * float(abs(gradients[1]).max()))


def test_bfloat16_keeps_its_dtypes_and_sums_the_head_in_float32(arrays):
    hidden, head = arrays["hidden"].astype(jnp.bfloat16), arrays["head"].astype(jnp.bfloat16)
    total, _ = chunked(hidden, head, arrays["weights"], arrays["labels"], 4)
    gradients = jax.grad(lambda *x: chunked(*x, arrays["weights"], arrays["labels"], 4)[0], argnums=(0, 1))(
        hidden, head
    )
    wanted = jax.grad(lambda *x: plain(*x, arrays["weights"], arrays["labels"])[0], argnums=(0, 1))(
        hidden.astype(jnp.float32), head.astype(jnp.float32)
    )
    assert total.dtype == jnp.float32
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert float(abs(ours.astype(jnp.float32) - theirs).max()) < 0.02 * float(abs(theirs).max())


def test_no_gradient_flows_through_the_losses_of_tokens(arrays):
    gradient = jax.grad(lambda h: chunked(h, arrays["head"], arrays["weights"], arrays["labels"], 4)[1].sum())
    assert not np.any(gradient(arrays["hidden"]))


def test_a_token_of_weight_zero_moves_nothing(arrays):
    left_out = arrays["weights"] == 0
    changed = jnp.where(left_out[..., None], 100.0, arrays["hidden"])
    run = jax.value_and_grad(lambda h: chunked(h, arrays["head"], arrays["weights"], arrays["labels"], 4)[0])
    (total, gradient), (other, other_gradient) = run(arrays["hidden"]), run(changed)
    np.testing.assert_allclose(total, other, rtol=1e-6)
    np.testing.assert_allclose(gradient, other_gradient, atol=1e-6)
    assert not np.any(other_gradient[left_out])


def test_a_chunk_of_no_token_is_refused(arrays):
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        chunked(arrays["hidden"], arrays["head"], arrays["weights"], arrays["labels"], 0)


@pytest.mark.parametrize("trained", [(0,), (0, 1)], ids=["frozen head", "trained head"])
def test_peak_memory_is_under_a_tenth_of_plain(trained):
    """Compiled, not run: 1,024 tokens over 32,003 words in pieces of 32, so logits are 131 MB against 4 MB."""
    rows, length, width, words = 2, 512, 32, 32003
    shapes = [(rows, length, width), (width, words), (rows, length)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def temporary(function):
        step = jax.jit(jax.value_and_grad(function, argnums=trained, has_aux=True))
        return step.lower(*arguments, labels).compile().memory_analysis().temp_size_in_bytes

    head = 4 * width * words * (len(trained) - 1)  # a trained head's gradient is summed in one array of its size
    logits = 4 * rows * length * words
    whole = temporary(plain)
    assert whole > 2 * logits
    assert temporary(functools.partial(chunked, chunk=32)) - 2 * head < whole / 10
