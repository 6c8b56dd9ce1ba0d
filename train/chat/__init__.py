"""Talking with a decoder: a tokenizer, a template and an adapter answering messages.

Imports `data` and `config`.
"""
