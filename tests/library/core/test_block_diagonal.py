"""Products with a block-diagonal matrix against NumPy: every form, alone, in a population and on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from melora_jax.core.blocks import block_diagonal
from melora_jax.core.products.batched import batched_product
from melora_jax.core.products.merged import add_block_diagonal
from melora_jax.core.products.packed import packed_product
from tests.support import reference

ROWS = 13
PRODUCTS = [packed_product, batched_product]
SHAPES = [(1, 5, 1), (3, 7, 1), (5, 1, 3), (3, 1, 1), (2, 5, 3)]  # n, p, q


def drawn(n: int, p: int, q: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n * p + q)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in ((ROWS, n * p), (n, p, q), (ROWS, n * q)))


def exact(x: np.ndarray, blocks: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, ...]:
    """The product and its gradients, in float64."""
    n, p, q = blocks.shape
    whole = reference.block_diagonal(list(blocks.astype(np.float64)))
    products = (x.T.astype(np.float64) @ cotangent).reshape(n, p, n, q)
    return x @ whole, cotangent @ whole.T, np.stack([products[k, :, k] for k in range(n)])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix_has_the_blocks_on_its_diagonal_and_zeros_beside(shape: tuple[int, int, int]) -> None:
    blocks = drawn(*shape)[1]
    np.testing.assert_array_equal(block_diagonal(blocks), reference.block_diagonal(list(blocks)))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_those_of_the_dense_product(shape: tuple[int, int, int], product: Any) -> None:
    x, blocks, cotangent = drawn(*shape)
    y, back = jax.vjp(jax.jit(product), x, blocks)
    for found, expected in zip((y, *back(cotangent)), exact(x, blocks, cotangent), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_sums_its_gradient_in_float32(shape: tuple[int, int, int]) -> None:
    x, blocks, cotangent = drawn(*shape, dtype=jnp.bfloat16)
    y, back = jax.vjp(packed_product, jnp.asarray(x), jnp.asarray(blocks))
    to_x, to_blocks = back(jnp.asarray(cotangent))
    assert {array.dtype for array in (y, to_x, to_blocks)} == {jnp.dtype(jnp.bfloat16)}
    expected = exact(*(np.asarray(array, np.float32) for array in (x, blocks, cotangent)))[2]
    np.testing.assert_allclose(np.asarray(to_blocks, np.float64), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_its_gradient_has_a_forward_mode_derivative(shape: tuple[int, int, int], product: Any) -> None:
    """As a product of the Hessian with a vector needs."""
    x, blocks, cotangent = drawn(*shape)

    def loss(given: Any, one: Any) -> Any:
        return (jnp.sin(one(*given)) * cotangent).sum()

    found, expected = (
        jax.jvp(lambda given, one=one: jax.grad(loss)(given, one), ((x, blocks),), ((2 * x, -blocks),))[1]
        for one in (product, lambda x, blocks: x @ block_diagonal(blocks))
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_members_of_a_population_have_gradients_of_their_own(shape: tuple[int, int, int], product: Any) -> None:
    x, blocks, cotangent = drawn(*shape)
    members = np.stack([blocks, 2 * blocks, -blocks])

    def loss(blocks: Any) -> Any:
        return (product(x, blocks) ** 2 * cotangent).sum()

    together = jax.vmap(jax.grad(loss))(members)
    for found, member in zip(together, members, strict=True):
        np.testing.assert_allclose(found, jax.grad(loss)(member), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_cut_over_a_mesh_sum_their_gradients(shape: tuple[int, int, int], product: Any) -> None:
    """Blocks that no axis varies along, of rows that one does."""
    x, blocks, cotangent = drawn(*shape)
    mesh, rows = Mesh(np.array(jax.devices()[:1]), "data"), PartitionSpec("data")

    def local(x: Any, cotangent: Any, blocks: Any) -> tuple[Any, ...]:
        y, back = jax.vjp(product, x, blocks)
        return y, *back(cotangent)

    cut = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=(rows, rows, PartitionSpec()))
    )
    for found, expected in zip(cut(x, cotangent, blocks), exact(x, blocks, cotangent), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_added_along_the_diagonal_alone(shape: tuple[int, int, int], r: int) -> None:
    n, p, q = shape
    rng = np.random.default_rng(0)
    matrix, left, right = (rng.normal(size=size).astype(np.float32) for size in ((n * p, n * q), (n, p, r), (n, r, q)))
    expected = matrix + reference.block_diagonal(list(left.astype(np.float64) @ right))
    np.testing.assert_allclose(add_block_diagonal(jnp.asarray(matrix), left, right), expected, rtol=1e-6, atol=1e-6)
