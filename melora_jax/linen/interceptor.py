"""The method interceptor that adds the adapters' outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from melora_jax.linen.site import LinenSite
from melora_jax.linen.trace import arguments_of, equation_of, is_layer
from melora_jax.linen.tree import joined

COLLECTION = "melora"
"""The name of the adapters' collection, and of the factors among a layer's params while the model runs."""


@dataclasses.dataclass
class _Call:
    """A call of a site in progress, and whether a call inside it has added the update."""

    path: str
    updated: bool = False


class AddUpdates:
    """The interceptor of one `apply`.

    If a subclass calls its parent's method, the interceptor sees both calls. The inner one, whose input is multiplied
    by the kernel, adds the update.

    Args:
      sites: the adapted layers by path.
      require_known: called for each layer without an adapter; raises if it should have one.
    """

    def __init__(self, sites: Mapping[str, LinenSite], require_known: Callable[[nn.Module, str], None]) -> None:
        self.sites = sites
        self.require_known = require_known
        self.calls: list[_Call] = []

    def __call__(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, joined(context.module.path)
        if not is_layer(module, context.method_name):
            return next_fun(*args, **kwargs)
        site = self.sites.get(path)
        if site is None:
            self.require_known(module, path)
            return next_fun(*args, **kwargs)
        call = _Call(path)
        self.calls.append(call)
        try:
            y = next_fun(*args, **kwargs)
        finally:
            self.calls.pop()
        if self.calls and self.calls[-1].path == path:
            self.calls[-1].updated = True
        if call.updated:
            return y
        arguments, factors = arguments_of(context, args, kwargs), module.get_variable("params", COLLECTION, {})
        x = next(iter(arguments.values()))
        return y + site.update(context.method_name, x, y, factors, equation_of(module, arguments))
