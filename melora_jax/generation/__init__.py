"""Text from decoders: prompts, the decoding loop and sampling.

Imports `models` and below.
"""

from melora_jax.generation.generate import Generation, NewTokens, generate, stream

__all__ = ["Generation", "NewTokens", "generate", "stream"]
