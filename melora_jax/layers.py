"""`MELoRADense` and the two variable types that say what is trained.

The tree of a layer before and after `adapt`::

    query                       query
      kernel  Param               base
      bias    Param                 kernel  FrozenParam
                                    bias    FrozenParam
                                  a         MELoRAParam  [n i r]
                                  b         MELoRAParam  [n r o]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax import blocks
from melora_jax.config import AdapterSpec, Init, Mixer, Scaling, Strategy
from melora_jax.dropout import dropout
from melora_jax.parallel import ParallelDot
from melora_jax.sharding import active_mesh
from melora_jax.slices import product_with_adapter
from melora_jax.views import DenseView, view_of, view_of_einsum


class MELoRAParam(nnx.Param):
    """A mini-adapter factor: an `nnx.Param`, so the usual `wrt=nnx.Param` trains it."""


class FrozenParam(nnx.Variable):
    """A base parameter that is not trained: no `nnx.Param`, so `wrt=nnx.Param` passes it by."""


class MELoRADense(nnx.Module):
    """A frozen dense layer plus n mini-adapters, each on its own slice of the input and the output.

        y = x·W + bias + concat_k( s_k · drop(x_k)·A_k·B_k )

    Source: MELoRA (arXiv 2402.17263), section 3.2. `MELoRADense(d_in, d_out, ...)` makes a new layer for people who
    write models; `MELoRADense.wrap(layer, ...)` is what `adapt` puts around an existing one.

    Args:
      d_in, d_out: sizes of the input and the output. Input `[..., d_in]`, output `[..., d_out]`.
      n, r, alpha, dropout, scaling, mixer, strategy, init: as in `MELoRAConfig`.
      use_bias, param_dtype: whether a new base has a bias, and the dtype of its parameters. The factors are float32.
      dtype: dtype of the computation; `None` promotes the input's and the parameters'.
      base: the layer to put the adapter on; by default a new, frozen `nnx.Linear`.
      path: name of the layer's dropout stream; layers of the same path draw one after another.
      rngs: source of the start values.

    Raises:
      ValueError: n does not divide a size, or the settings contradict each other.

    >>> layer = MELoRADense(8, 12, n=4, r=1, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 8))).shape, layer.a.shape, layer.b.shape
    ((2, 12), (4, 2, 1), (4, 1, 3))
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        n: int = 8,
        r: int | Sequence[int] = 1,
        alpha: float | Sequence[float] = 16.0,
        dropout: float = 0.0,
        scaling: Scaling = "mini",
        mixer: Mixer = "identity",
        strategy: Strategy = "auto",
        init: Init = "kaiming",
        use_bias: bool = True,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        base: nnx.Module | None = None,
        path: str = "",
        rngs: nnx.Rngs,
    ):
        self.spec = AdapterSpec(
            n=n,
            r=tuple(r) if isinstance(r, Sequence) else (r,) * n,
            alpha=tuple(map(float, alpha)) if isinstance(alpha, Sequence) else (float(alpha),) * n,
            dropout=dropout,
            scaling=scaling,
            mixer=mixer,
            strategy=strategy,
            init=init,
            dtype=None if dtype is None else jnp.dtype(dtype).name,
        )
        check_sizes(d_in, d_out, n, path or type(self).__name__)
        if base is None:
            base = nnx.Linear(d_in, d_out, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for name, parameter in nnx.state(base, nnx.Param).items():
                setattr(base, str(name), freeze(parameter))
        a, b = blocks.init_factors(rngs.params(), d_in, d_out, self.spec)
        self.base: Any = base
        self.a = MELoRAParam(a)
        self.b = MELoRAParam(b)
        self.path = path
        self.strategy: Strategy = blocks.choose_strategy(strategy, n * max(self.spec.r), jax.default_backend())

    @classmethod
    def wrap(cls, layer: nnx.Module, spec: AdapterSpec, *, path: str, rngs: nnx.Rngs) -> MELoRADense:
        """Puts an adapter around `layer`, which stays the object it was, its parameters typed as they were.

        Args:
          layer: an `nnx.Linear`, `LinearGeneral`, `Einsum` or `Embed`.
          spec: the adapter.
          path: the layer's place in its model, for errors and the dropout stream.
          rngs: source of A's start values.

        Raises:
          ValueError: a layer without a flat kernel, or sizes that n does not divide.
        """
        view = checked_view(layer, spec.n, path)
        options = dataclasses.asdict(spec)
        return cls(view.d_in, view.d_out, **options, base=layer, path=path, rngs=rngs)

    @property
    def view(self) -> DenseView:
        """How the base layer's input, output and kernel lie flat."""
        return view_of(self.base)

    @property
    def kernel_variable(self) -> nnx.Variable:
        """The base's kernel (an Embed's is its table)."""
        return getattr(self.base, self.view.kernel_name)

    @property
    def scale(self) -> np.ndarray:
        """s_k for each latent, [n r]."""
        return blocks.scale_of(self.spec)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The base layer's output plus the adapter's; further arguments go to the base layer."""
        mesh = active_mesh()
        if mesh is not None and isinstance(getattr(self.base, "dot_general", None), ParallelDot):
            return product_with_adapter(
                self.base, mesh, x, self._factors_for, self.scale, self.spec, self.strategy, self.path
            )
        y = self.base(x, *args, **kwargs)
        view = self._view_for_call(*args, **kwargs)
        a, b = self._factors_for(y)
        update = blocks.expand(self._latents(x, a, view), b, self.scale, self.spec.mixer, self.strategy)
        return y + view.unflatten_output(update).astype(y.dtype)

    def _factors_for(self, y: jax.Array | jax.ShapeDtypeStruct) -> tuple[jax.Array, jax.Array]:
        """A and B in the dtype of the computation."""
        dtype = jnp.dtype(self.spec.dtype or y.dtype)
        return self.a[...].astype(dtype), self.b[...].astype(dtype)

    def _latents(self, x: jax.Array, a: jax.Array, view: DenseView) -> jax.Array:
        """drop(x_k)·A_k; an embedding's dropout drops whole tokens."""
        if view.lookup:
            return blocks.look_up(x, a, dropout(jnp.ones(x.shape, a.dtype), self.spec.dropout, self.path))
        flat = view.flatten_input(x).astype(a.dtype)
        return blocks.reduce(dropout(flat, self.spec.dropout, self.path), a, self.strategy)

    def _view_for_call(self, *args: Any, **kwargs: Any) -> DenseView:
        """The base's view, or that of an equation given to an Einsum at the call.

        Raises:
          ValueError: an equation that sums over other axes of the kernel than the layer's own, whose flat kernel the
            factors belong to.
        """
        own = self.view
        equation = args[0] if args else kwargs.get("einsum_str")
        if not isinstance(self.base, nnx.Einsum) or not isinstance(equation, str):
            return own
        view = view_of_einsum(equation, tuple(self.base.kernel_shape))
        if (view.order, view.d_in) != (own.order, own.d_in):
            raise ValueError(
                f"Einsum at {self.path} is called with {equation!r}, which uses its kernel in another way than its own "
                f"{self.base.einsum_str!r}; leave the layer out with exclude={[self.path]}"
            )
        return view

    def attend(self, query: jax.Array, **kwargs: Any) -> jax.Array:
        """An adapted embedding used as output layer: query·(E + ΔE)ᵀ, `[..., features]` to `[..., num_embeddings]`.

        The adapter's dropout is of the embedding's own input, so there is none here.
        """
        if not isinstance(self.base, nnx.Embed):
            raise AttributeError(f"{type(self.base).__name__!r} at {self.path} has no attend; only an Embed has")
        y = self.base.attend(query, **kwargs)
        a, b = self._factors_for(y)
        row = jax.ShapeDtypeStruct((*query.shape[:-1], self.view.d_in), a.dtype)

        def forward(x: jax.Array) -> jax.Array:
            return blocks.apply(x, a, b, self.scale, self.spec.mixer)

        (update,) = jax.linear_transpose(forward, row)(query.astype(a.dtype))
        return y + update.astype(y.dtype)

    def delta(self) -> jax.Array:
        """ΔW as a flat `[d_in, d_out]` array in float32."""
        return blocks.delta(self.a[...], self.b[...], self.scale, self.spec.mixer)

    def packed_factors(self) -> tuple[jax.Array, jax.Array]:
        """Plain LoRA factors, `[d_in, R]` and `[R, d_out]`, whose product is ΔW."""
        return blocks.packed_factors(self.a[...], self.b[...], self.scale, self.spec.mixer)

    def merged(self) -> jax.Array:
        """W + ΔW in the base kernel's layout and dtype, summed in float32."""
        kernel = self.kernel_variable[...]
        delta = self.view.unflatten_kernel(self.delta(), kernel.shape)
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

    # Hosts read these off a layer; they see the base's. A host that computes with `kernel` itself, instead of
    # calling the layer, bypasses the adapter: `adapt(..., probe=...)` finds that.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)


def freeze(variable: nnx.Variable) -> nnx.Variable:
    """The same value and metadata as a `FrozenParam`, which remembers the type it had."""
    metadata = variable.get_metadata() | {"thawed": type(variable)}
    return FrozenParam.from_metadata(variable.get_raw_value(), metadata)


def thaw(variable: FrozenParam) -> nnx.Variable:
    """The inverse of `freeze`."""
    metadata = variable.get_metadata()
    return metadata.pop("thawed").from_metadata(variable.get_raw_value(), metadata)


def checked_view(layer: nnx.Module, n: int, path: str) -> DenseView:
    """The layer's flat view, once it is known that n divides it.

    Raises:
      ValueError: no flat view, or sizes that n does not divide; both name the path and the remedy.
    """
    try:
        view = view_of(layer)
    except ValueError as error:
        raise ValueError(f"{path} can't be adapted: {error}; leave it out with exclude={[path]}") from None
    check_sizes(view.d_in, view.d_out, n, path)
    return view


def check_sizes(d_in: int, d_out: int, n: int, path: str) -> None:
    """Raises ValueError unless n divides both sizes; the message lists the n that do."""
    for name, size in (("d_in", d_in), ("d_out", d_out)):
        if size % n:
            fits = ", ".join(str(k) for k in range(1, min(d_in, d_out, 128) + 1) if d_in % k == 0 == d_out % k)
            raise ValueError(f"n={n} does not divide {name}={size} at {path}; choose n from {fits}")
