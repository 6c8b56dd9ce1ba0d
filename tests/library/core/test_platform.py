"""The platform that is traced for: asked in one place, told by `compile_for`, and part of what JAX's caches know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import melora_jax as mj
from melora_jax.core.platform import compile_for, platform


def test_the_default_backend_is_asked_in_one_place() -> None:
    files = Path(mj.__file__).parent.rglob("*.py")
    asked = [path.name for path in files for _ in re.findall(r"default_backend\(", path.read_text())]
    assert asked == ["platform.py"]


def test_it_is_this_machines_outside_and_the_inner_one_inside() -> None:
    assert platform() == jax.default_backend()
    with compile_for("tpu"):
        with compile_for("gpu"):
            assert platform() == "gpu"
        assert platform() == "tpu"
    assert platform() == jax.default_backend()


def test_a_jitted_function_is_traced_again_for_another_platform() -> None:
    traced = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        traced.append(platform())
        return x + len(traced)

    x = jnp.zeros(())
    with compile_for("tpu"):
        assert (function(x), function(x)) == (1, 1)
    assert function(x) == 2
    assert traced == ["tpu", jax.default_backend()]


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError, match="platform 'cuda' is unknown; choose cpu, gpu or tpu"), compile_for("cuda"):
        pass


@pytest.mark.parametrize(("n", "r", "strategy"), [(8, 8, "merged"), (8, 1, "packed")])
def test_a_layer_traced_for_another_platform_has_none_of_the_forms_of_xla_on_cpu(n: int, r: int, strategy: str) -> None:
    """No scan over blocks, and no call that may not be inlined, as a layer traced for the CPU has."""
    layer = mj.MELoRADense(48, 48, n=n, r=r, strategy=strategy, rngs=nnx.Rngs(0))
    graphdef, trained, frozen = nnx.split(layer, nnx.Param, ...)

    def loss(trained: Any, x: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, trained, frozen)(x) ** 2).sum()

    def of_cpu(program: str) -> set[str]:
        return {sign for sign in ("stablehlo.while", 'inlineable = "false"') if sign in program}

    x, found = jnp.ones((5, 48)), {}
    for name in ("cpu", "tpu"):
        with compile_for(name):
            found[name] = of_cpu(jax.jit(jax.grad(loss)).lower(trained, x).as_text())
    assert found == {"cpu": {"merged": {"stablehlo.while"}, "packed": {'inlineable = "false"'}}[strategy], "tpu": set()}
