"""The same adapters for Flax Linen models, in a collection of their own.

    from melora_jax import linen

    adapted, melora = linen.adapt(model, variables, config, key, x)    # print(adapted) shows the sites
    y = adapted.apply({**variables, "melora": melora}, x)              # like model.apply; train only melora
    plain = adapted.merge({**variables, "melora": melora})             # model.apply(plain, x) gives y again

`adapt` traces one call of the model, without computing it, to find the layers. The collection mirrors `params`, with
the factors in place of the layer's kernel::

    params/layer_0/query/kernel [d_in, d_out]        melora/layer_0/query/a [n i r] and b [n r o]

During `apply` a method interceptor adds the adapters' outputs. The factors pass through the model's own transforms
together with their kernels: `nn.scan` and `nn.vmap` stack both, and a layer that is called twice has one of each.

Imports `checkpoints`, `core` and below.
"""

from melora_jax.linen.adapt import adapt
from melora_jax.linen.adapted_module import AdaptedModule

__all__ = ["AdaptedModule", "adapt"]
