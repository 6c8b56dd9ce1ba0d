"""Laws of a layer and of a model: LoRA and GraLoRA as special cases, rank, locality, counts, the tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import melora_jax as mj
from tests.support import reference, tiny

D_IN, D_OUT = 42, 30


def layer_of(seed: int, **changes: Any) -> mj.MELoRADense:
    """A layer whose A and B are random in every entry, the padding of narrower minis too."""
    layer = mj.MELoRADense(D_IN, D_OUT, **changes, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(seed)
    for factor in (layer.a, layer.b):
        factor[...] = jnp.asarray(rng.normal(size=factor.shape), jnp.float32)
    return layer


def factors(layer: mj.MELoRADense) -> tuple[list[np.ndarray], list[np.ndarray]]:
    a, b, r = np.asarray(layer.a[...]), np.asarray(layer.b[...]), layer.spec.r
    return [a[k, :, :rank] for k, rank in enumerate(r)], [b[k, :rank] for k, rank in enumerate(r)]


@nnx.jit
def run(layer: Any, x: jax.Array) -> jax.Array:
    return layer(x)


def peft_output(config: Any, layer: mj.MELoRADense, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The output of PEFT's own layer around the same base, with the parameters `weights` by the end of their names."""
    import peft
    import torch

    base = torch.nn.Linear(D_IN, D_OUT)
    base.weight.data = torch.tensor(np.asarray(layer.base.kernel[...]).T.copy())
    base.bias.data = torch.tensor(np.asarray(layer.base.bias[...]))
    model = peft.get_peft_model(torch.nn.ModuleDict({"dense": base}), config)
    for name, parameter in model.named_parameters():
        for end, value in weights.items():
            if name.endswith(end):
                assert parameter.shape == value.shape
                parameter.data = torch.tensor(value.copy())
                break
        else:
            assert "base_layer" in name
    with torch.no_grad():
        return model.base_model.model["dense"](torch.tensor(x)).numpy()


def drawn_input(*batch: int) -> Any:
    return np.random.default_rng(4).normal(size=(*batch, D_IN)).astype(np.float32)


LORA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "n=1 is LoRA": ({"n": 1, "r": 5, "alpha": 7}, {"r": 5, "lora_alpha": 7}),
    "n=1 with rslora is rsLoRA": (
        {"n": 1, "r": 5, "alpha": 7, "scaling": "rslora"},
        {"r": 5, "lora_alpha": 7, "use_rslora": True},
    ),
    "identity is LoRA of rank n·r with block-diagonal factors": (
        {"n": 3, "r": 2, "alpha": 7, "scaling": "total"},
        {"r": 6, "lora_alpha": 7},
    ),
    "all is LoRA of rank r": ({"n": 3, "r": 2, "alpha": 7, "mixer": "all"}, {"r": 2, "lora_alpha": 7}),
}


@pytest.mark.parity
@pytest.mark.parametrize("strategy", ["batched", "packed", "merged"])
@pytest.mark.parametrize("name", LORA)
def test_the_layer_is_pefts_lora(name: str, strategy: Any) -> None:
    import peft

    ours, theirs = LORA[name]
    layer = layer_of(1, **ours, strategy=strategy)
    a, b = factors(layer)
    left, right = (
        (np.concatenate(a), np.concatenate(b, axis=1))
        if layer.spec.mixer == "all"
        else (reference.block_diagonal(a), reference.block_diagonal(b))
    )
    weights = {"lora_A.default.weight": left.T.astype(np.float32), "lora_B.default.weight": right.T.astype(np.float32)}
    config = peft.LoraConfig(target_modules=["dense"], **theirs)
    x = drawn_input(2, 3)
    np.testing.assert_allclose(run(layer, x), peft_output(config, layer, weights, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("strategy", ["batched", "packed", "merged"])
@pytest.mark.parametrize(("n", "r"), [(2, 4), (3, 3), (6, 12)])
def test_the_shuffle_mixer_is_pefts_gralora(n: int, r: int, strategy: Any) -> None:
    import peft

    layer = layer_of(2, n=n, r=r, alpha=5, mixer="shuffle", strategy=strategy)
    weights = {"gralora_A.default": np.asarray(layer.a[...]), "gralora_B.default": np.asarray(layer.b[...])}
    config = peft.GraloraConfig(target_modules=["dense"], r=r, alpha=5, gralora_k=n, hybrid_r=0)
    x = drawn_input(2, 3)
    np.testing.assert_allclose(run(layer, x), peft_output(config, layer, weights, x), rtol=1e-5, atol=1e-5)
    a, b = factors(layer)
    np.testing.assert_allclose(layer.delta(), reference.gralora_delta(a, b, 5 / r), rtol=1e-5, atol=1e-5)


SHAPES = [
    ("identity", (5,), 5),
    ("identity", (1, 2, 3), 6),
    ("identity", (9, 2, 20), 9 + 2 + 10),  # no mini has a higher rank than its slices are wide: 14 in, 10 out
    ("all", (4, 4, 4), 4),
    ("shuffle", (6, 6, 6), 18),
    ("shuffle", (6,) * 6, 30),  # no update has a higher rank than the layer is wide
]


@pytest.mark.parametrize(("mixer", "r", "rank"), SHAPES)
def test_rank_and_parameters_are_those_that_are_told(mixer: Any, r: tuple[int, ...], rank: int) -> None:
    layer, n = layer_of(3, n=len(r), r=r, mixer=mixer), len(r)
    assert layer.spec.rank == (r[0] if mixer == "all" else sum(r)) >= rank
    gradient, delta = nnx.jit(
        lambda layer, x: (nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer), layer.delta()),
    )(layer, drawn_input(5))
    assert np.linalg.matrix_rank(np.asarray(delta), rtol=1e-5) == rank
    learning = sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(gradient))
    assert learning == sum(mini * (D_IN // n + D_OUT // n) for mini in r) == layer.spec.parameters(D_IN, D_OUT)


@pytest.mark.parametrize("strategy", ["batched", "packed", "merged"])
@pytest.mark.parametrize("mixer", ["identity", "all", "shuffle"])
def test_an_input_slice_moves_its_own_output_slice_alone_unless_mixed(mixer: Any, strategy: Any) -> None:
    layer = layer_of(5, n=3, r=3, mixer=mixer, strategy=strategy)
    layer.base.kernel[...] *= 0
    x = drawn_input(2)
    y = np.asarray(run(layer, x)).reshape(2, 3, -1)
    for j in range(3):
        other = x.copy()
        other[:, j * D_IN // 3 : (j + 1) * D_IN // 3] += 1.0
        moved = (np.asarray(run(layer, other)).reshape(2, 3, -1) != y).all((0, 2))
        still = (np.asarray(run(layer, other)).reshape(2, 3, -1) == y).all((0, 2))
        own = np.arange(3) == j
        np.testing.assert_array_equal(moved, own if mixer == "identity" else [True] * 3)
        np.testing.assert_array_equal(still, ~own if mixer == "identity" else [False] * 3)


def test_the_whole_tree_of_a_small_adapted_model() -> None:
    model = tiny.Encoder(dtype=jnp.bfloat16)
    mj.adapt(
        model,
        tiny.config(r=[1, 2], targets=["query", "embed"], n_pattern={"embed": 1}, rank_pattern={"embed": 4}),
        rngs=nnx.Rngs(0),
    )
    found = {
        "/".join(map(str, path)): (type(variable).__name__, variable.shape, str(variable.dtype))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    assert found == {
        "classifier/bias": ("Param", (3,), "float32"),
        "classifier/kernel": ("Param", (6, 3), "float32"),
        "embed/a": ("MELoRAParam", (1, 13, 4), "float32"),
        "embed/b": ("MELoRAParam", (1, 4, 6), "float32"),
        "embed/base/embedding": ("FrozenParam", (13, 6), "bfloat16"),
        "layer/0/out/kernel": ("FrozenParam", (10, 6), "bfloat16"),
        "layer/0/query/a": ("MELoRAParam", (2, 3, 2), "float32"),
        "layer/0/query/b": ("MELoRAParam", (2, 2, 5), "float32"),
        "layer/0/query/base/bias": ("FrozenParam", (10,), "bfloat16"),
        "layer/0/query/base/kernel": ("FrozenParam", (6, 10), "bfloat16"),
        "layer/0/value/bias": ("FrozenParam", (10,), "bfloat16"),
        "layer/0/value/kernel": ("FrozenParam", (6, 10), "bfloat16"),
        "layer/1/out/kernel": ("FrozenParam", (10, 6), "bfloat16"),
        "layer/1/query/a": ("MELoRAParam", (2, 3, 2), "float32"),
        "layer/1/query/b": ("MELoRAParam", (2, 2, 5), "float32"),
        "layer/1/query/base/bias": ("FrozenParam", (10,), "bfloat16"),
        "layer/1/query/base/kernel": ("FrozenParam", (6, 10), "bfloat16"),
        "layer/1/value/bias": ("FrozenParam", (10,), "bfloat16"),
        "layer/1/value/kernel": ("FrozenParam", (6, 10), "bfloat16"),
    }
