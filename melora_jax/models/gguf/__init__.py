"""GGUF files: the reader, and a file's configuration, tensors and tokenizer in Hugging Face's terms.

Imports `validation` alone.
"""

from melora_jax.models.gguf.tokenizer import tokenizer_from_gguf

__all__ = ["tokenizer_from_gguf"]
