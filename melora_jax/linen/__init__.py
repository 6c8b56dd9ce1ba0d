"""The same adapters for Flax Linen models, in a collection of their own.

    from melora_jax import linen

    adapted, melora = linen.adapt(model, variables, config, key, x)    # print(adapted) shows the sites
    y = adapted.apply({**variables, "melora": melora}, x)              # as model.apply; train melora alone
    plain = adapted.merge({**variables, "melora": melora})             # model.apply(plain, x) gives y again

`adapt` follows one call of the model, without computing it, to see which layers it calls. The collection mirrors
`params`, with the factors where the layer has its kernel::

    params/layer_0/query/kernel [d_in, d_out]        melora/layer_0/query/a [n i r] and b [n r o]

During `apply` a method interceptor adds the adapters' outputs. The factors go through the model's own transforms beside
the kernels they belong to: stacked as the kernel by `nn.scan` and `nn.vmap`, once for a layer that is called twice.
"""

from melora_jax.linen.adapt import adapt
from melora_jax.linen.adapted_module import AdaptedModule

__all__ = ["AdaptedModule", "adapt"]
