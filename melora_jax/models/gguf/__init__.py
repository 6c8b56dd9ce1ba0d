"""GGUF files: the reader, and a file's config, tensors and tokenizer in Hugging Face's terms.

Imports `validation` alone.
"""
