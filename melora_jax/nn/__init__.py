"""NNX layers and trees that know no adapter: sharding, parallel and quantised dense layers, scanned stacks, attention.

Imports `core` and below.
"""

from melora_jax.nn.quantized import Quantization, quantize
from melora_jax.nn.scan_layers import Stacking, stack_layers, unstack_layers
from melora_jax.nn.sharding import batch_sharding, make_mesh

__all__ = ["Quantization", "Stacking", "batch_sharding", "make_mesh", "quantize", "stack_layers", "unstack_layers"]
