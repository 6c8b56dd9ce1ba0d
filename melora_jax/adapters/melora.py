"""`MELoRADense`: a dense layer with an adapter.

The tree of a layer before and after `adapt`::

    query                       query
      kernel  Param               base
      bias    Param                 kernel  FrozenParam
                                    bias    FrozenParam
                                  a         MELoRAParam  [n i r]
                                  b         MELoRAParam  [n r o]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from melora_jax import validation
from melora_jax.adapters.layer_plan import computes_a_dense_product, kernel_and_bias, may_merge, plan_layer
from melora_jax.adapters.params import MELoRAParam, freeze
from melora_jax.adapters.tensor_parallel import output_on_mesh
from melora_jax.config import AdapterSpec, Init, Kind, Mixer, Scaling, Strategy, Variant
from melora_jax.core import blocks
from melora_jax.core.dense_view import DenseView, view_at_call
from melora_jax.core.initializers import init_factors
from melora_jax.core.products.latents import attend_update, update
from melora_jax.core.products.merged import merged_kernel
from melora_jax.core.products.plan import ProductPlan, plan_product, planned_strategy
from melora_jax.core.products.product import adapted_product
from melora_jax.core.report import Site
from melora_jax.nn.layer_view import checked_view, view_of
from melora_jax.nn.quantized import QuantizedLinear


class MELoRADense(nnx.Module):
    """A frozen dense layer plus n mini-adapters, each on its own slice of the input and the output.

        y = x·W + bias + concat_k( s_k · drop(x_k)·A_k·B_k )

    Source: MELoRA (arXiv 2402.17263), section 3.2. `MELoRADense(d_in, d_out, ...)` makes a new layer for people who
    write models; `MELoRADense.wrap(layer, ...)` is what `adapt` puts around an existing one.

    Args:
      d_in, d_out: sizes of the input and the output. Input `[..., d_in]` of any float dtype, output `[..., d_out]`.
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

    # What a kind of adapter says of itself; the others are DoRADense, AdaLoRADense and PiSSADense.
    kind: ClassVar[Kind] = "plain"
    variant: ClassVar[Variant] = "plain"
    setting: ClassVar[str] = "variant='plain'"
    """What asks for it in a config, for messages."""
    mergeable: ClassVar[bool] = True
    """Whether `strategy="merged"` can form W + ΔW as the sum of W and s·A·B."""
    one_device: ClassVar[bool] = False
    """Whether it runs on one device alone."""
    alpha_varies: ClassVar[bool] = True
    """Whether the members of a population may differ in alpha, by way of B."""
    has_budget: ClassVar[bool] = False
    """Whether a `RankBudget` applies."""
    low_rank: ClassVar[bool] = True
    """Whether the update is that of the plain MELoRA which `plain` gives."""
    peft_settings: ClassVar[Mapping[str, bool]] = {"use_dora": False}
    """What PEFT's adapter_config.json says of it."""
    peft_tensors: ClassVar[Mapping[str, str]] = {}
    """What PEFT calls the arrays beside A and B that its own file of this kind holds."""

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
        _spec: AdapterSpec | None = None,  # `wrap` hands on the settings as they are, in place of n ... init
    ):
        where = path or type(self).__name__
        self.spec = _spec or AdapterSpec(
            n=n,
            r=tuple(r) if isinstance(r, Sequence) else (r,) * n,
            alpha=tuple(map(float, alpha)) if isinstance(alpha, Sequence) else (float(alpha),) * n,
            dropout=dropout,
            scaling=scaling,
            mixer=mixer,
            strategy=strategy,
            init=init,
            dtype=None if dtype is None else jnp.dtype(dtype).name,
            variant=self.variant,
        )
        if base is None:
            self._require_kind(self.spec, where)
            validation.check_sizes(d_in, d_out, n, where)
            base = nnx.Linear(d_in, d_out, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for name, parameter in nnx.state(base, nnx.Param).items():
                setattr(base, str(name), freeze(parameter))
        else:
            self.checked(base, self.spec, where)
        self.base: Any = base
        self.path = path
        self.enabled = True  # see `disable_adapters`
        a, b = self._start(rngs.params(), d_in, d_out)
        self.a = MELoRAParam(a)
        self.b = MELoRAParam(b)
        self.merges = may_merge(base, self.spec, None if self.mergeable else type(self).__name__, path)

    @classmethod
    def wrap(cls, layer: nnx.Module, spec: AdapterSpec, *, path: str, rngs: nnx.Rngs) -> MELoRADense:
        """Puts an adapter around `layer`, which stays the object it was, its parameters typed as they were.

        Args:
          layer: an `nnx.Linear`, `LinearGeneral`, `Einsum` or `Embed`.
          spec: the settings of an adapter of this kind.
          path: the layer's place in its model, for errors and the dropout stream.
          rngs: source of A's start values.

        Raises:
          ValueError: a layer without a flat kernel, sizes that n does not divide, or settings of another kind.
        """
        view = cls.checked(layer, spec, path)
        return cls(view.d_in, view.d_out, base=layer, path=path, rngs=rngs, _spec=spec)

    @classmethod
    def checked(cls, layer: nnx.Module, spec: AdapterSpec, path: str) -> DenseView:
        """The flat view of a layer that this adapter can be put on.

        Raises:
          ValueError: it has none, n does not divide it, or the settings are of another kind; all name the path.
        """
        cls._require_kind(spec, path)
        return checked_view(layer, spec.n, path)

    @classmethod
    def _require_kind(cls, spec: AdapterSpec, where: str) -> None:
        if spec.kind != cls.kind:
            given = f"{cls.__name__} is for {cls.setting}, and the settings of {where} are of kind {spec.kind!r}"
            raise ValueError(f"{given}; take the class that melora_jax.adapters.kind_of gives")

    @classmethod
    def shapes(cls, spec: AdapterSpec, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays that make up an adapter of this kind and are saved, by name: a, b and others."""
        return spec.shapes(d_in, d_out)

    @classmethod
    def parameters(cls, spec: AdapterSpec, d_in: int, d_out: int) -> int:
        """How many numbers an adapter of this kind trains at a layer of these sizes, without padding."""
        return spec.parameters(d_in, d_out)

    @classmethod
    def product_spec(cls, spec: AdapterSpec) -> AdapterSpec:
        """The settings of the plain adapter whose product an adapter of this kind computes."""
        return spec

    @classmethod
    def plain(cls, spec: AdapterSpec, arrays: Mapping[str, np.ndarray]) -> tuple[AdapterSpec, np.ndarray, np.ndarray]:
        """The settings and factors of the plain MELoRA that has the same update, as exports and arithmetic need it.

        Of DoRA, whose update has no low rank, it is the one before the normalisation.
        """
        return spec, arrays["a"], arrays["b"]

    @property
    def arrays(self) -> dict[str, nnx.Variable]:
        """The variables that make up the adapter and are saved, by name."""
        return {name: getattr(self, name) for name in self.shapes(self.spec, self.view.d_in, self.view.d_out)}

    def row(self, path: str) -> Site:
        """The adapter as `describe` reports it."""
        spec, sizes = self.spec, (self.view.d_in, self.view.d_out)
        rank, parameters = self.product_spec(spec).rank, self.parameters(spec, *sizes)
        return Site.of(path, spec, sizes, rank=rank, parameters=parameters, strategy=self.strategy)

    def multiply_alpha(self, factor: jax.Array) -> None:
        """Multiplies the update by `factor`, as a member of a population whose alpha differs from the model's needs it.

        Raises:
          ValueError: of this kind alpha is more than a factor of the update.
        """
        if not self.alpha_varies:
            raise ValueError(f"{self.setting} at {self.path}: members of a population must share alpha; leave it out")
        self.b.set_value(self.b[...] * factor)

    def _start(self, key: jax.Array, d_in: int, d_out: int) -> tuple[jax.Array, jax.Array]:
        """Start values of a and b."""
        return init_factors(key, d_in, d_out, self.spec)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A and B as they are multiplied, `[n i r]` and `[n r o]`."""
        return self.a[...], self.b[...]

    @property
    def view(self) -> DenseView:
        """How the base layer's input, output and kernel lie flat."""
        return view_of(self.base)

    @property
    def kernel_variable(self) -> nnx.Variable:
        """The base's kernel: an Embed's is its table, and the codes stand for one that is quantised."""
        return self.base.codes if isinstance(self.base, QuantizedLinear) else getattr(self.base, self.view.kernel_name)

    @property
    def scale(self) -> np.ndarray:
        """s_k for each latent of `factors`, [n r]."""
        return blocks.scale_of(self.product_spec(self.spec))

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The base layer's output plus the adapter's; further arguments go to the base layer."""
        if not self.enabled:
            return self.base(x, *args, **kwargs)
        plan = self.plan_for(x.shape, self._view_for_call(*args, **kwargs))
        (a, b), keep = self.factors(), plan.mask(x.shape, self.path)
        if plan.cut is not None:
            return output_on_mesh(self.base, plan, x, a, b, keep)
        if plan.strategy == "merged" or (computes_a_dense_product(self.base) and not (args or kwargs)):
            kernel, bias = kernel_and_bias(self.base, x)
            return adapted_product(plan, x, kernel, a, b, keep, bias)
        y = self.base(x, *args, **kwargs)
        return y + update(plan, x, a, b, keep, y.dtype)

    def plan_for(self, shape: tuple[int, ...], view: DenseView | None = None) -> ProductPlan:
        """How the product for an input of `shape` is computed, on the mesh in force and the platform traced for."""
        return plan_layer(self.base, self.product_spec(self.spec), view or self.view, shape, self.merges)

    @property
    def strategy(self) -> Strategy:
        """What `spec.strategy` stands for on many tokens, on the platform traced for."""
        return planned_strategy(self.product_spec(self.spec), self.merges)

    def strategy_for(self, tokens: int) -> Strategy:
        """What `spec.strategy` stands for with `tokens` tokens on a device: "auto" forms W + ΔW if that costs less."""
        return plan_product(self.product_spec(self.spec), self.view, tokens, mergeable=self.merges).strategy

    def _view_for_call(self, *args: Any, **kwargs: Any) -> DenseView:
        """The base's view, or that of an equation given to an Einsum at the call."""
        equation = args[0] if args else kwargs.get("einsum_str")
        if not isinstance(self.base, nnx.Einsum) or not isinstance(equation, str):
            return self.view
        return view_at_call(equation, self.base.einsum_str, tuple(self.base.kernel_shape), self.path)

    def attend(self, query: jax.Array, **kwargs: Any) -> jax.Array:
        """An adapted embedding used as output layer: query·(E + ΔE)ᵀ, `[..., features]` to `[..., num_embeddings]`."""
        if not isinstance(self.base, nnx.Embed):
            raise AttributeError(f"{type(self.base).__name__!r} at {self.path} has no attend; only an Embed has")
        y = self.base.attend(query, **kwargs)
        if not self.enabled:
            return y
        plan = plan_product(self.product_spec(self.spec), self.view)
        return y + attend_update(plan, query, *self.factors(), y.dtype)

    def delta(self) -> jax.Array:
        """ΔW as a flat `[d_in, d_out]` array in float32."""
        return blocks.delta(*self.factors(), self.scale, self.spec.mixer)

    def packed_factors(self) -> tuple[jax.Array, jax.Array]:
        """Plain LoRA factors, `[d_in, R]` and `[R, d_out]`, whose product is ΔW (in DoRA, before its normalisation)."""
        return blocks.packed_factors(*self.factors(), self.scale, self.spec.mixer)

    def merged(self) -> jax.Array:
        """W + ΔW in the base kernel's layout and dtype, summed in float32 at least."""
        return merged_kernel(
            self.product_spec(self.spec), self.view, getattr(self.base, self.view.kernel_name)[...], *self.factors()
        )

    # Hosts read these off a layer; they see the base's. A host that computes with `kernel` itself, instead of
    # calling the layer, bypasses the adapter: `adapt(..., probe=...)` finds that.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)
