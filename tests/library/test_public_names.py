"""Every public name of the library is documented: what it is, and an example that runs as a doctest."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import melora_jax


def _packages() -> list[str]:
    found = pkgutil.walk_packages(melora_jax.__path__, "melora_jax.")
    return ["melora_jax", *(module.name for module in found if module.ispkg)]


def _public() -> dict[str, Any]:
    """The public classes and functions by the name under which users import them."""
    found = {}
    for package in map(importlib.import_module, _packages()):
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{package.__name__}.{name}"] = value
    return found


@pytest.mark.parametrize("name", sorted(_public()))
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(_public()[name]) or ""
    assert text
    assert ">>> " in text
