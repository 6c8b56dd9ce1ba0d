"""The platform that is traced for: asked in one place, told by `compile_for`, and part of what JAX's caches know."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

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
