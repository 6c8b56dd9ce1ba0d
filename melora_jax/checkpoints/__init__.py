"""Adapters on disk: our own format, PEFT's, orbax, model cards, inspection and arithmetic.

Imports `training`, `models`, `adapters` and below.
"""
