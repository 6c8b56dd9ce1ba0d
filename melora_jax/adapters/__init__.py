"""Adapters on NNX models: parameter types, the kinds of adapter, which modules get one, adapting and merging.

Imports `nn`, `core` and below.
"""
